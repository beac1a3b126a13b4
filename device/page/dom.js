// Elements of the page.

export const $ = id => document.getElementById(id);

export function element(name, kind, ...children) {
  const made = document.createElement(name);
  if (kind) made.className = kind;
  made.append(...children);
  return made;
}
