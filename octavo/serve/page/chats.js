// Conversations in the browser's storage, each under a key of its own, so that tabs do not overwrite one another's.
//
// A conversation is {id, revision, title, system, updated, turns: [{role, content, note?, error?}]}.

const PREFIX = "octavo.chat.";

export function create() {
  const id = crypto.randomUUID?.() ?? String(Math.random()).slice(2); // the first by HTTPS and on this machine alone
  return { id, revision: 0, title: "", system: localStorage.getItem("octavo.system") ?? "", turns: [] };
}

// All that are kept, the latest first.
export function list() {
  return Object.keys(localStorage)
    .filter((key) => key.startsWith(PREFIX))
    .map((key) => load(key.slice(PREFIX.length)))
    .filter((chat) => chat)
    .sort((a, b) => b.updated - a.updated);
}

export function load(id) {
  try {
    const chat = JSON.parse(localStorage.getItem(PREFIX + id));
    const whole = Array.isArray(chat?.turns) && chat.turns.every((t) => t?.role && typeof t.content === "string");
    return whole ? { ...create(), ...chat, id } : null;
  } catch {
    return null;
  }
}

// Where another tab has gone on with the same conversation, this one becomes a conversation of its own.
export function save(chat) {
  const kept = load(chat.id);
  if (kept && kept.revision !== chat.revision) chat.id = create().id;
  chat.revision += 1;
  chat.updated = Date.now();
  chat.title = (chat.turns.find((turn) => turn.role === "user")?.content ?? "").replace(/\s+/g, " ").slice(0, 80);
  localStorage.setItem(PREFIX + chat.id, JSON.stringify(chat));
}

export function remove(id) {
  localStorage.removeItem(PREFIX + id);
}

// Calls back with the id of what another tab has changed.
export function onChange(changed) {
  addEventListener("storage", (event) => {
    if (event.key === null || event.key.startsWith(PREFIX)) changed(event.key?.slice(PREFIX.length));
  });
}
