// Answers are Markdown. What they hold is a model's, so it is sanitised: no script, no address, no attribute.

/* global marked, DOMPurify */

const ALLOWED = {
  ALLOWED_TAGS: ["p", "br", "strong", "em", "del", "code", "pre", "ul", "ol", "li", "blockquote", "hr",
    "table", "thead", "tbody", "tr", "th", "td"],
  ALLOWED_ATTR: ["start"], ALLOW_DATA_ATTR: false, ALLOW_ARIA_ATTR: false, RETURN_DOM_FRAGMENT: true,
};

function escaped(text) { return text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;"); }

const renderer = {
  html: ({ text }) => escaped(text),  // shown as it was written
  heading({ tokens }) { return `<p><strong>${this.parser.parseInline(tokens)}</strong></p>`; },
  link({ tokens }) { return this.parser.parseInline(tokens); },  // the page is all there is: nothing to go to
  image: ({ text }) => escaped(text),
  checkbox: ({ checked }) => checked ? "☑ " : "☐ ",
};

let parser = null;

/** Shows a text in an element. */
export function render(target, text) {
  parser ??= new marked.Marked({ gfm: true, breaks: true, renderer });
  target.replaceChildren(DOMPurify.sanitize(parser.parse(text), ALLOWED));
}
