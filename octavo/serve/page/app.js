// A chat with the model of this server, and its cache beside it. Plain DOM, no build step.

import * as chats from "./chats.js";
import { count, paint, remember } from "./cache.js";
import { headers, sampling, start as startSettings } from "./settings.js";
import { get, stream } from "./server.js";
import { button, copy, element, render } from "./text.js";

const $ = (id) => document.getElementById(id);
const OPENINGS = [
  "Tell me a story about a fox who found a book.",
  "What does a printer do with a sheet of paper?",
  "Write a short poem about remembering.",
];
const message = $("message");
const scroll = $("scroll");

let chat = chats.load(sessionStorage.getItem("octavo.current")) ?? chats.create();
let model = null;
let cache = null; // the latest of /cache
const growing = new Map(); // conversation → {turn, controller} of the answer that is being written
const articles = new WeakMap(); // turn → its article, where it is shown

function keep(changed) {
  if (changed.deleted) return;
  try {
    chats.save(changed);
    if (changed === chat) sessionStorage.setItem("octavo.current", chat.id);
  } catch { // the storage is full, or there is none: it lives as long as the page
    $("complaint").textContent = "The browser keeps nothing more: delete old conversations, or lose this one.";
  }
  listChats();
}

// ---- the conversation ------------------------------------------------------------------------------------------------

function show(turn) {
  const article = element("article", `turn ${turn.role}`);
  article.append(element("h2", "", turn.role === "user" ? "You" : model || "Octavo"), element("div", "text"));
  articles.set(turn, article);
  $("turns").append(article);
  update(turn);
  return article;
}

function update(turn) {
  const article = articles.get(turn);
  if (!article?.isConnected) return;
  const answer = growing.get(chat)?.turn === turn;
  article.classList.toggle("growing", answer);
  render(article.querySelector(".text"), turn.content, turn.role === "user");
  article.querySelectorAll("footer, .error").forEach((old) => old.remove());
  if (turn.error) article.append(element("p", "error", turn.error));
  if (!answer) article.append(footer(turn));
}

function footer(turn) {
  const made = element("footer");
  const actions = element("span", "actions");
  const copied = button("Copy", null, () => copy(turn.content, copied));
  actions.append(copied);
  if (turn.role === "user") actions.append(button("Edit", null, () => edit(turn)));
  else actions.append(button("Regenerate", null, () => again(turn)));
  if (turn.note) made.append(element("span", "note", turn.note));
  made.append(actions);
  return made;
}

function showAll() {
  $("turns").replaceChildren();
  chat.turns.forEach(show);
  $("empty").hidden = chat.turns.length > 0;
  $("system-note").hidden = !chat.system;
  $("system-note").textContent = chat.system;
  $("complaint").textContent = "";
  toEnd();
  busy();
  paintCache();
}

const atEnd = () => scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 60;
const toEnd = () => (scroll.scrollTop = scroll.scrollHeight);

// ---- asking ----------------------------------------------------------------------------------------------------------

async function ask(text) {
  const mine = chat; // another may be opened before the answer's end
  const question = { role: "user", content: text };
  const turn = { role: "assistant", content: "" };
  const system = mine.system ? [{ role: "system", content: mine.system }] : [];
  const messages = [...system, ...mine.turns, question].map(({ role, content }) => ({ role, content }));
  mine.turns.push(question, turn);
  const controller = new AbortController();
  growing.set(mine, { turn, controller });
  $("empty").hidden = true;
  $("complaint").textContent = "";
  show(question);
  show(turn);
  toEnd();
  busy();

  const heard = await listen(turn, messages, controller, mine);
  growing.delete(mine);
  if (turn.content || heard) {
    update(turn);
    keep(mine);
    if (mine === chat) $("announce").textContent = turn.error ?? turn.content;
  } else { // no answer began: the message goes back to where it was written
    mine.turns.splice(-2);
    if (mine === chat) {
      showAll();
      $("complaint").textContent = turn.error ?? "";
      message.value ||= text;
      grow();
    }
  }
  busy();
  poll();
}

// Fills `turn` with the answer as it comes; whether one came to its end.
async function listen(turn, messages, controller, mine) {
  let usage, reason, first, frame;
  const paintTurn = () => {
    frame = 0;
    const follow = mine === chat && atEnd();
    update(turn);
    if (follow) toEnd();
  };
  try {
    const body = { ...sampling(), messages, stream: true, stream_options: { include_usage: true } };
    for await (const chunk of stream("/v1/chat/completions", body, headers(), controller.signal)) {
      const choice = chunk.choices?.[0];
      if (choice?.delta?.content) {
        turn.content += choice.delta.content;
        if (!first) keep(mine);
        first ??= performance.now();
      }
      reason = choice?.finish_reason ?? reason;
      usage = chunk.usage ?? usage;
      frame ||= requestAnimationFrame(paintTurn);
    }
    turn.note = note(usage, reason, (performance.now() - first) / 1000);
    turn.tokens = usage?.total_tokens;
  } catch (error) {
    if (error.name === "AbortError") turn.note = "stopped";
    else turn.error = error.message;
    if (error.status === 401) askForKey();
  }
  cancelAnimationFrame(frame);
  return Boolean(reason);
}

function note(usage, reason, seconds) {
  if (!usage) return "";
  const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
  const parts = [`${count(usage.completion_tokens)} tokens`];
  if (usage.completion_tokens > 1 && seconds > 0) {
    parts.push(`${((usage.completion_tokens - 1) / seconds).toPrecision(3)} tokens/s`);
  }
  if (cached) parts.push(`${count(cached)} of ${count(usage.prompt_tokens)} prompt tokens were in the cache`);
  if (reason === "length") parts.push("cut off: it may not be longer");
  return parts.join(" · ");
}

// Write a question anew: what came after it goes.
function edit(turn) {
  if (growing.has(chat)) return;
  const article = articles.get(turn);
  const form = element("form", "edit");
  const field = element("textarea");
  field.ariaLabel = "Edit the message";
  field.value = turn.content;
  const send = element("button", "primary", "Send");
  const cancel = button("Cancel", null, () => update(turn));
  form.append(field, send, cancel);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const text = field.value.trim();
    if (text) askFrom(turn, text);
  });
  form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      form.requestSubmit();
    } else if (event.key === "Escape") {
      event.stopPropagation();
      update(turn);
    }
  });
  const text = article.querySelector(".text");
  text.replaceChildren(form);
  article.querySelector("footer")?.remove();
  field.style.height = `${field.scrollHeight + 2}px`;
  field.focus();
}

// Another answer to the question before it.
function again(turn) {
  const question = chat.turns[chat.turns.indexOf(turn) - 1];
  if (question && !growing.has(chat)) askFrom(question, question.content);
}

function askFrom(turn, text) {
  chat.turns.splice(chat.turns.indexOf(turn));
  showAll();
  ask(text);
  message.focus();
}

function busy() {
  const answering = growing.has(chat);
  $("send").hidden = answering;
  $("stop").hidden = !answering;
  $("turns").ariaBusy = String(answering);
  if (document.activeElement === document.body) message.focus();
}

// ---- the list of conversations ---------------------------------------------------------------------------------------

function listChats() {
  const items = chats.list().map((kept) => {
    const item = element("li");
    const title = kept.title || "Untitled";
    const open = button(title, null, () => openChat(chats.load(kept.id)));
    Object.assign(open, { className: "open", title });
    if (kept.id === chat.id) open.setAttribute("aria-current", "true");
    const gone = button("×", `Delete ${title}`, () => deleteChat(kept));
    gone.className = "delete";
    item.append(open, gone);
    return item;
  });
  $("chat-list").replaceChildren(...items);
  $("no-chats").hidden = items.length > 0;
}

function openChat(opened) {
  const same = [...growing.keys()].find((one) => one.id === opened?.id); // it goes on where it is
  chat = same ?? opened ?? chats.create();
  sessionStorage.setItem("octavo.current", chat.id);
  foldList(false);
  showAll();
  listChats();
  message.focus();
}

function deleteChat(kept) {
  if (!confirm(`Delete “${kept.title || "Untitled"}”?`)) return;
  for (const [one, { controller }] of growing) {
    if (one.id === kept.id) {
      one.deleted = true;
      controller.abort();
    }
  }
  chats.remove(kept.id);
  if (kept.id === chat.id) openChat(null);
  else listChats();
}

function foldList(open) {
  $("chats").classList.toggle("open", open);
  $("open-chats").ariaExpanded = String(open);
  if (open) $("chat-list").querySelector("button")?.focus();
}

chats.onChange((id) => {
  if (id === chat.id && !growing.has(chat) && chats.load(id)) {
    chat = chats.load(id);
    showAll();
  }
  listChats();
});

// ---- keys and buttons ------------------------------------------------------------------------------------------------

function grow() {
  message.style.height = "auto";
  message.style.height = `${message.scrollHeight + 2}px`;
}

function submit() {
  const text = message.value.trim();
  if (!text || growing.has(chat)) return;
  message.value = "";
  grow();
  ask(text);
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
message.addEventListener("input", grow);
message.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    submit();
  } else if (event.key === "ArrowUp" && !message.value) {
    const last = chat.turns.findLast((turn) => turn.role === "user");
    if (last) {
      event.preventDefault();
      edit(last);
    }
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || $("settings").open) return;
  if ($("chats").classList.contains("open")) {
    foldList(false);
    $("open-chats").focus();
  } else growing.get(chat)?.controller.abort();
});
$("stop").addEventListener("click", () => {
  growing.get(chat)?.controller.abort();
  message.focus();
});
$("new").addEventListener("click", () => openChat(null));
$("open-chats").addEventListener("click", () => foldList(!$("chats").classList.contains("open")));
document.addEventListener("click", (event) => { // beside the list
  const open = $("chats").classList.contains("open");
  if (open && !event.target.closest("#chats, #open-chats") && event.target.isConnected) foldList(false);
});
for (const opening of OPENINGS) {
  const item = element("li");
  item.append(
    button(opening, null, () => {
      if (!growing.has(chat)) ask(opening);
      message.focus();
    }),
  );
  $("openings").append(item);
}

$("key").value = sessionStorage.getItem("octavo.key") ?? "";
$("key-form").addEventListener("submit", (event) => event.preventDefault());
$("key").addEventListener("input", () => {
  sessionStorage.setItem("octavo.key", $("key").value.trim());
  poll();
});

function askForKey() {
  $("cache").open = true;
  $("key").focus();
}

startSettings(
  () => chat,
  (system) => {
    chat.system = system;
    localStorage.setItem("octavo.system", system); // new conversations begin with it
    if (chat.turns.length) keep(chat);
    showAll();
  },
);

// ---- the cache -------------------------------------------------------------------------------------------------------

function paintCache() {
  if (!cache) return;
  paint(cache, chat.turns.findLast((turn) => turn.tokens)?.tokens ?? 0, growing.has(chat));
  if (model !== cache.model) {
    model = cache.model;
    document.title = `${model} · Octavo`;
    for (const name of document.querySelectorAll(".turn.assistant > h2")) name.textContent = model;
  }
  $("model").textContent = model;
}

let polling = false;

async function poll() {
  if (polling || document.hidden) return;
  polling = true;
  try {
    cache = await get("/cache", headers());
    remember(cache.tokens_per_second);
    $("trouble").textContent = "";
    paintCache();
  } catch (error) {
    const silent = error.name === "TypeError" || error.name === "TimeoutError";
    $("trouble").textContent = silent ? "The server does not answer." : error.message;
  }
  polling = false;
}

const narrow = matchMedia("(max-width: 52rem)");
const fold = () => ($("cache").open = !narrow.matches);
narrow.addEventListener("change", fold);
fold();
setInterval(poll, 1000);
document.addEventListener("visibilitychange", poll);
addEventListener("pagehide", () => { // answers that are being written, too
  for (const [one, { turn }] of growing) if (turn.content) keep(one);
});
poll();
showAll();
listChats();
grow();
