// The cache beside the chat: its blocks as a sheet folded to eight leaves, its bytes, its speed.

const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const LEAVES = 8;
const MOST = 64; // cells of a leaf; a cell stands for as many blocks as make them fit
const rates = [];
let drawn = 0;

export const count = (n) => n.toLocaleString("en");

export function bytes(n) {
  for (const unit of ["B", "KiB", "MiB", "GiB", "TiB"]) {
    if (n < 1000 || unit === "TiB") return `${unit === "B" ? n : n.toPrecision(3)} ${unit}`;
    n /= 1024;
  }
}

// `state` is what /cache tells; `tokens` are those of the conversation that is shown.
export function paint(state, tokens, answering) {
  drawSheet(state.blocks_total);
  const held = state.blocks_used + state.blocks_cached;
  const cells = $("sheet").querySelectorAll("rect");
  const cellsOf = (blocks) => Math.ceil((blocks / state.blocks_total) * cells.length);
  const used = cellsOf(state.blocks_used);
  const full = Math.max(used, cellsOf(held));
  cells.forEach((cell, i) => cell.setAttribute("class", i < used ? "used" : i < full ? "kept" : ""));
  const inUse = `${count(state.blocks_used)} of ${count(state.blocks_total)} blocks in use`;
  $("sheet").setAttribute("aria-label", `${inUse}, ${count(state.blocks_cached)} kept`);
  $("used").textContent = count(state.blocks_used);
  $("kept").textContent = count(state.blocks_cached);
  $("free").textContent = count(state.blocks_total - held);
  paintBytes(state, held);
  paintSpeed(state.tokens_per_second);

  const waiting = state.sessions_waiting ? `, ${count(state.sessions_waiting)} waiting` : "";
  $("sessions").textContent = `${count(state.sessions_running)} running${waiting}`;
  const [hit, asked] = [state.prefix_hit_tokens, state.prefix_query_tokens];
  $("hits").textContent = asked ? `${count(hit)} tokens (${Math.round((100 * hit) / asked)} %)` : "none yet";
  const raw = state.raw_pages_per_session * state.raw_page_bytes;
  const mine = Math.ceil(tokens / state.block_size) * state.block_bytes + raw;
  $("here").textContent = tokens ? `${count(tokens)} tokens, ${bytes(mine)}` : answering ? "growing" : "empty";
  $("saved-row").hidden = state.sessions_saved === null;
  if (state.sessions_saved !== null) {
    const chats = `${count(state.sessions_saved)} chat${state.sessions_saved === 1 ? "" : "s"}`;
    $("saved").textContent = `${chats}, ${bytes(state.sessions_saved_bytes)}`;
  }
}

function paintBytes(state, held) {
  const here = state.bytes_used + state.bytes_cached;
  const here16 = state.bytes_used_16_bits + state.bytes_cached_16_bits;
  const ratio = here ? here16 / here : state.block_bytes_16_bits / state.block_bytes;
  const widest = Math.max(here, here16, 1);
  $("format").textContent = state.format;
  $("ratio").textContent = `${ratio.toFixed(2)}× smaller`;
  $("ratio").hidden = ratio <= 1;
  $("bytes-now").textContent = bytes(here);
  $("bytes-16").textContent = bytes(here16);
  $("bar-now").style.width = `${(100 * here) / widest}%`;
  $("bar-16").style.width = `${(100 * here16) / widest}%`;
  $("brief").textContent = `${count(held)} of ${count(state.blocks_total)} blocks · ${bytes(here)}`;
}

export function remember(rate) {
  rates.push(rate);
  if (rates.length > 60) rates.shift();
}

function paintSpeed(rate) {
  $("speed").textContent = rate < 10 ? rate.toFixed(1) : count(Math.round(rate));
  const most = Math.max(...rates, 1);
  const points = rates.map((r, i) => `${60 - rates.length + i + 1} ${(15 - (14 * r) / most).toFixed(2)}`);
  $("trace").firstElementChild.setAttribute("d", points.length > 1 ? `M${points.join("L")}` : "");
}

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
