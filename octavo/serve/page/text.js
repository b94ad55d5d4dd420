// What was written, as Markdown. HTML in it is text; what comes out is sanitized all the same.

import { getDefaults, lexer, parser, Renderer } from "./vendor/marked.js";
import "./vendor/purify.js";

const TAGS = [
  ...["h1", "h2", "h3", "h4", "h5", "h6", "p", "br", "hr", "blockquote", "pre", "code", "ul", "ol", "li", "strong"],
  ...["em", "del", "a", "table", "thead", "tbody", "tr", "th", "td"],
];
const ATTRIBUTES = ["href", "title", "class", "start", "align"];
const WORDS = ["start", "align"]; // hold no address
const SAFE = /^(?:https?:|mailto:|#)/i;
const ALLOWED = {
  ALLOWED_TAGS: TAGS,
  ALLOWED_ATTR: ATTRIBUTES,
  ALLOWED_URI_REGEXP: SAFE,
  ADD_URI_SAFE_ATTR: WORDS,
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

const escape = (text) => text.replace(/[&<>"]/g, (sign) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[sign]);

class Text extends Renderer {
  html({ text }) {
    return escape(text);
  }
  image({ href, text }) { // nothing is loaded from elsewhere: a picture is a link to it
    return SAFE.test(href) ? `<a href="${escape(href)}">${escape(text || href)}</a>` : escape(text);
  }
  checkbox({ checked }) {
    return checked ? "☑ " : "☐ ";
  }
  heading({ tokens, depth }) { // below the headings of the page itself
    const level = Math.min(6, depth + 2);
    return `<h${level}>${this.parser.parseInline(tokens)}</h${level}>`;
  }
}

const plain = { ...getDefaults(), renderer: new Text() };
const withBreaks = { ...plain, breaks: true };

// Shows `text`; what has not changed since the last time stays as it is, with what is selected in it.
export function render(into, text, breaks = false) {
  const options = breaks ? withBreaks : plain;
  const blocks = lexer(text, options).filter((token) => token.type !== "space" && token.type !== "def");
  blocks.forEach((token, i) => {
    const old = into.children[i];
    if (old?.source === token.raw) return;
    const block = element("div", "block");
    block.source = token.raw;
    const html = parser([token], options);
    block.append(DOMPurify.sanitize(html, ALLOWED));
    dress(block);
    if (old) old.replaceWith(block);
    else into.append(block);
  });
  while (into.children.length > blocks.length) into.lastChild.remove();
}

export function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

export function button(text, label, act) {
  const made = element("button", "", text);
  made.type = "button";
  if (label) made.ariaLabel = label;
  made.addEventListener("click", act);
  return made;
}

export async function copy(text, from) {
  const before = from.textContent;
  try {
    await navigator.clipboard.writeText(text);
    from.textContent = "Copied";
  } catch { // a page that did not come by HTTPS may not
    from.textContent = "Not allowed";
  }
  setTimeout(() => (from.textContent = before), 1500);
}

// Links open elsewhere; code can be copied; what is too wide is scrolled, by the keyboard too.
function dress(block) {
  for (const link of block.querySelectorAll("a")) {
    if (link.href) Object.assign(link, { target: "_blank", rel: "noopener noreferrer" });
    else link.replaceWith(...link.childNodes);
  }
  for (const pre of block.querySelectorAll("pre")) {
    const language = /language-(\S+)/.exec(pre.firstElementChild?.className ?? "")?.[1] ?? "";
    const head = element("div", "code-head");
    const copied = button("Copy", `Copy ${language} code`.replace("  ", " "), () => copy(pre.textContent.replace(/\n$/, ""), copied));
    head.append(element("span", "", language), copied);
    const frame = element("div", "code");
    pre.replaceWith(frame);
    frame.append(head, pre);
    scrolls(pre, `${language} code`.trim());
  }
  for (const table of block.querySelectorAll("table")) {
    const frame = element("div", "wide");
    table.replaceWith(frame);
    frame.append(table);
    scrolls(frame, "table");
  }
}

function scrolls(part, label) {
  part.tabIndex = 0;
  part.setAttribute("role", "region");
  part.ariaLabel = label;
}
