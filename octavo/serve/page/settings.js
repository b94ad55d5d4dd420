// The dialog of settings: how answers are drawn, for all conversations of this browser; the system prompt, for one.

const $ = (id) => document.getElementById(id);
const KEY = "octavo.sampling";
const FIELDS = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed"];

// The fields of a request that are set; what is not is as the model's own configuration has it.
export function sampling() {
  try {
    const kept = JSON.parse(localStorage.getItem(KEY)) ?? {};
    return Object.fromEntries(FIELDS.filter((name) => typeof kept[name] === "number").map((name) => [name, kept[name]]));
  } catch {
    return {};
  }
}

export const headers = () => {
  const key = $("key").value.trim();
  return key ? { Authorization: `Bearer ${key}` } : {};
};

// `chat` tells the conversation that is shown; `changed` is called after its system prompt is set.
export function start(chat, changed) {
  const dialog = $("settings");
  $("open-settings").addEventListener("click", () => {
    const set = sampling();
    for (const name of FIELDS) $(name).value = set[name] ?? "";
    $("system").value = chat().system;
    $("theme").value = localStorage.getItem("octavo.theme") ?? "system";
    dialog.showModal();
  });
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close()); // beside it
  $("settings-form").addEventListener("submit", (event) => {
    if (event.submitter?.value === "cancel") return;
    const given = FIELDS.filter((name) => $(name).value !== "").map((name) => [name, Number($(name).value)]);
    localStorage.setItem(KEY, JSON.stringify(Object.fromEntries(given)));
    if (chat().system !== $("system").value) changed($("system").value);
  });
  $("reset").addEventListener("click", () => {
    for (const name of [...FIELDS, "system"]) $(name).value = "";
  });
  $("theme").addEventListener("change", () => {
    const theme = $("theme").value;
    localStorage.setItem("octavo.theme", theme);
    if (theme === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
  });
}
