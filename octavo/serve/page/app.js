// A chat with the model of this server, and its cache beside it. Plain DOM: what the model writes is only ever text.

const $ = (id) => document.getElementById(id);
const OPENINGS = [
  "Tell me a story about a fox who found a book.",
  "What does a printer do with a sheet of paper?",
  "Write a short poem about remembering.",
];
const SVG = "http://www.w3.org/2000/svg";

// ---- state -----------------------------------------------------------------------------------------------------------

let turns = load(); // [{role, content, note?, error?}]
let answering = null; // AbortController of the answer that is being written
let model = null;
let cache = null; // the latest of /cache
const rates = [];

function load() {
  try {
    const kept = JSON.parse(localStorage.getItem("octavo.chat"));
    return Array.isArray(kept) ? kept.filter((turn) => turn?.role && typeof turn.content === "string") : [];
  } catch {
    return [];
  }
}

function keep() {
  try {
    localStorage.setItem("octavo.chat", JSON.stringify(turns));
  } catch {
    // private windows may have no storage: the conversation lives as long as the page
  }
}

function headers() {
  const key = $("key").value.trim();
  return key ? { Authorization: `Bearer ${key}` } : {};
}

// ---- text ------------------------------------------------------------------------------------------------------------

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

// Paragraphs, fenced code and `code`; everything else as it was written.
function render(into, text) {
  into.replaceChildren();
  const parts = text.split(/^```[^\n]*\n?/m);
  parts.forEach((part, i) => {
    if (i % 2) {
      const pre = element("pre");
      pre.append(element("code", "", part.replace(/\n$/, "")));
      into.append(pre);
      return;
    }
    for (const paragraph of part.split(/\n{2,}/)) {
      if (!paragraph.trim()) continue;
      const p = element("p");
      paragraph.replace(/^\n+|\n+$/g, "").split(/`([^`\n]+)`/).forEach((piece, j) => {
        if (piece) p.append(j % 2 ? element("code", "", piece) : piece);
      });
      into.append(p);
    }
  });
}

function show(turn) {
  const article = element("article", `turn ${turn.role}`);
  article.append(element("h3", "", turn.role === "user" ? "You" : model || "Octavo"), element("div", "text"));
  $("turns").append(article);
  update(article, turn);
  return article;
}

function update(article, turn) {
  render(article.querySelector(".text"), turn.content);
  article.querySelectorAll("footer, .error").forEach((old) => old.remove());
  if (turn.error) article.append(element("p", "error", turn.error));
  if (turn.note) article.append(element("footer", "", turn.note));
}

function showAll() {
  $("turns").replaceChildren();
  turns.forEach(show);
  $("empty").hidden = turns.length > 0;
  toEnd();
}

const scroll = $("scroll");
const atEnd = () => scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 60;
const toEnd = () => (scroll.scrollTop = scroll.scrollHeight);

// ---- asking ----------------------------------------------------------------------------------------------------------

async function ask(text) {
  const mine = turns; // "New chat" puts another in its place
  const question = { role: "user", content: text };
  const turn = { role: "assistant", content: "" };
  const messages = [...mine, question].map(({ role, content }) => ({ role, content }));
  mine.push(question, turn);
  $("empty").hidden = true;
  $("complaint").textContent = "";
  const asked = show(question);
  const article = show(turn);
  article.classList.add("growing");
  toEnd();
  const controller = new AbortController();
  busy(controller);

  let usage = null;
  let reason = null;
  let frame = 0;
  const paint = () => {
    frame = 0;
    const follow = atEnd();
    update(article, turn);
    if (follow) toEnd();
  };
  try {
    const body = { messages, stream: true, stream_options: { include_usage: true } };
    for await (const chunk of stream("/v1/chat/completions", body, controller.signal)) {
      const choice = chunk.choices?.[0];
      turn.content += choice?.delta?.content ?? "";
      reason = choice?.finish_reason ?? reason;
      usage = chunk.usage ?? usage;
      frame ||= requestAnimationFrame(paint);
    }
    turn.note = note(usage, reason);
    turn.tokens = usage.total_tokens;
  } catch (error) {
    if (error.name === "AbortError") turn.note = "stopped";
    else turn.error = error.message;
  }
  cancelAnimationFrame(frame);
  busy(null);
  article.classList.remove("growing");
  if (turns !== mine) return;
  if (turn.content || reason) {
    paint();
    $("announce").textContent = turn.error ?? turn.content;
  } else { // no answer began: the message goes back to where it was written
    mine.splice(-2);
    asked.remove();
    article.remove();
    $("empty").hidden = mine.length > 0;
    $("complaint").textContent = turn.error ?? "";
    message.value ||= text;
    grow();
  }
  keep();
  poll();
}

function note(usage, reason) {
  if (!usage) return "";
  const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
  const parts = [`${count(usage.completion_tokens)} tokens`];
  if (cached) parts.push(`${count(cached)} of ${count(usage.prompt_tokens)} prompt tokens were in the cache`);
  if (reason === "length") parts.push("cut off: it may not be longer");
  return parts.join(" · ");
}

// Server-sent events of a POST, parsed from JSON; throws what the server said was wrong.
async function* stream(url, body, signal) {
  let response;
  try {
    response = await fetch(url, {
      method: "POST",
      headers: { "Content-Type": "application/json", ...headers() },
      body: JSON.stringify(body),
      signal,
    });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Error("The server does not answer.");
  }
  if (!response.ok) {
    if (response.status === 401) askForKey();
    throw new Error(await complaint(response));
  }
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The answer was broken off.");
    const events = (rest + value).split(/\r?\n\r?\n/);
    rest = events.pop();
    for (const event of events) {
      const data = event.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim());
      if (!data.length) continue;
      if (data[0] === "[DONE]") return;
      const chunk = JSON.parse(data.join("\n"));
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}

async function complaint(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answers ${response.status}.`;
  }
}

function busy(controller) {
  answering = controller;
  $("send").hidden = Boolean(controller);
  $("stop").hidden = !controller;
  $("turns").ariaBusy = String(Boolean(controller));
  if (document.activeElement === document.body) message.focus();
}

// ---- keys and buttons ------------------------------------------------------------------------------------------------

const message = $("message");

function grow() {
  message.style.height = "auto";
  message.style.height = `${message.scrollHeight + 2}px`;
}

function submit() {
  const text = message.value.trim();
  if (!text || answering) return;
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
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") answering?.abort();
});
$("stop").addEventListener("click", () => {
  answering?.abort();
  message.focus();
});
$("new").addEventListener("click", () => {
  answering?.abort();
  turns = [];
  keep();
  showAll();
  paintCache();
  message.focus();
});
for (const opening of OPENINGS) {
  const button = element("button", "", opening);
  button.type = "button";
  button.addEventListener("click", () => {
    if (!answering) ask(opening);
    message.focus();
  });
  const item = element("li");
  item.append(button);
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

// ---- the cache -------------------------------------------------------------------------------------------------------

const count = (n) => n.toLocaleString("en");

function bytes(n) {
  for (const unit of ["B", "KiB", "MiB", "GiB", "TiB"]) {
    if (n < 1000 || unit === "TiB") return `${unit === "B" ? n : n.toPrecision(3)} ${unit}`;
    n /= 1024;
  }
}

// An octavo: four leaves by two, each of equal cells; a cell stands for as many blocks as make them fit.
const LEAVES = 8;
const MOST = 64; // cells of a leaf
let drawn = 0;

function drawSheet(total) {
  if (drawn === total) return;
  drawn = total;
  const sheet = $("sheet");
  const perLeaf = Math.min(MOST, Math.ceil(total / LEAVES));
  const columns = Math.ceil(Math.sqrt(perLeaf));
  const rows = Math.ceil(perLeaf / columns);
  const [cell, gap, margin] = [7, 2, 8];
  const width = columns * (cell + gap) - gap + 2 * margin;
  const height = rows * (cell + gap) - gap + 2 * margin;
  sheet.setAttribute("viewBox", `0 0 ${4 * width} ${2 * height}`);
  sheet.replaceChildren();
  const draw = (name, attributes) => {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    sheet.append(made);
  };
  const cells = Math.min(total, perLeaf * LEAVES);
  for (let i = 0; i < cells; i++) {
    const leaf = Math.floor(i / perLeaf);
    const place = i % perLeaf;
    draw("rect", {
      x: (leaf % 4) * width + margin + (place % columns) * (cell + gap),
      y: Math.floor(leaf / 4) * height + margin + Math.floor(place / columns) * (cell + gap),
      width: cell,
      height: cell,
    });
  }
  for (const x of [1, 2, 3]) draw("line", { class: "fold", x1: x * width, x2: x * width, y1: 0, y2: 2 * height });
  draw("line", { class: "fold", x1: 0, x2: 4 * width, y1: height, y2: height });
}

function paintCache() {
  const now = cache;
  if (!now) return;
  drawSheet(now.blocks_total);
  const held = now.blocks_used + now.blocks_cached;
  const free = now.blocks_total - held;
  const cells = $("sheet").querySelectorAll("rect");
  const cellsOf = (blocks) => Math.ceil((blocks / now.blocks_total) * cells.length);
  const used = cellsOf(now.blocks_used);
  const full = Math.max(used, cellsOf(held));
  cells.forEach((cell, i) => cell.setAttribute("class", i < used ? "used" : i < full ? "kept" : ""));
  const told = `${count(now.blocks_used)} of ${count(now.blocks_total)} blocks in use, ${count(now.blocks_cached)} kept`;
  $("sheet").setAttribute("aria-label", told);
  $("used").textContent = count(now.blocks_used);
  $("kept").textContent = count(now.blocks_cached);
  $("free").textContent = count(free);

  const here = now.bytes_used + now.bytes_cached;
  const here16 = now.bytes_used_16_bits + now.bytes_cached_16_bits;
  const ratio = here ? here16 / here : now.block_bytes_16_bits / now.block_bytes;
  const widest = Math.max(here, here16, 1);
  $("format").textContent = now.format;
  $("ratio").textContent = `${ratio.toFixed(2)}× smaller`;
  $("ratio").hidden = ratio <= 1;
  $("bytes-now").textContent = bytes(here);
  $("bytes-16").textContent = bytes(here16);
  $("bar-now").style.width = `${(100 * here) / widest}%`;
  $("bar-16").style.width = `${(100 * here16) / widest}%`;

  const rate = now.tokens_per_second;
  $("speed").textContent = rate < 10 ? rate.toFixed(1) : count(Math.round(rate));
  const most = Math.max(...rates, 1);
  const points = rates.map((r, i) => `${60 - rates.length + i + 1} ${(15 - (14 * r) / most).toFixed(2)}`);
  $("trace").firstElementChild.setAttribute("d", points.length > 1 ? `M${points.join("L")}` : "");

  const waiting = now.sessions_waiting ? `, ${count(now.sessions_waiting)} waiting` : "";
  $("sessions").textContent = `${count(now.sessions_running)} running${waiting}`;
  const [hit, asked] = [now.prefix_hit_tokens, now.prefix_query_tokens];
  $("hits").textContent = asked ? `${count(hit)} tokens (${Math.round((100 * hit) / asked)} %)` : "none yet";
  const tokens = turns.findLast((turn) => turn.tokens)?.tokens ?? 0;
  const mine = Math.ceil(tokens / now.block_size) * now.block_bytes + now.raw_pages_per_session * now.raw_page_bytes;
  $("here").textContent = tokens ? `${count(tokens)} tokens, ${bytes(mine)}` : answering ? "growing" : "empty";
  $("saved-row").hidden = now.sessions_saved === null;
  if (now.sessions_saved !== null) {
    $("saved").textContent = `${count(now.sessions_saved)} chat${now.sessions_saved === 1 ? "" : "s"}, ${bytes(now.sessions_saved_bytes)}`;
  }
  $("brief").textContent = `${count(held)} of ${count(now.blocks_total)} blocks · ${bytes(here)}`;
  if (model !== now.model) {
    model = now.model;
    document.title = `${model} · Octavo`;
    for (const name of document.querySelectorAll(".turn.assistant h3")) name.textContent = model;
  }
  $("model").textContent = model;
}

let polling = false;

async function poll() {
  if (polling || document.hidden) return;
  polling = true;
  try {
    const response = await fetch("/cache", { headers: headers(), signal: AbortSignal.timeout(5000) });
    if (!response.ok) throw new Error(await complaint(response));
    cache = await response.json();
    rates.push(cache.tokens_per_second);
    if (rates.length > 60) rates.shift();
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
addEventListener("pagehide", keep); // an answer that is being written, too
poll();
if (turns.at(-1)?.role === "assistant" && !turns.at(-1).content) turns.pop();
if (turns.at(-1)?.role === "user") message.value = turns.pop().content; // it was never answered
showAll();
grow();
