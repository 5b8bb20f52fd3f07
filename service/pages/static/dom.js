// Building and announcing what is on the page. Text only ever goes in as text.

export const find = (id) => document.getElementById(id);

/** An element: attributes as given, `onclick` and the like as listeners, false and null left out. */
export function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== false && child != null));
  return element;
}

export const button = (label, onclick, attributes = {}) =>
  el("button", { type: "button", onclick, ...attributes }, label);

/** Say something to screen readers alone. */
export function announce(text) {
  find("status").textContent = text;
}

/** Say loudly what went wrong, or what waits. One notice a kind: the same kind again replaces it, no text takes it away. */
export function notice(kind, text, ...actions) {
  const notices = find("notices");
  notices.querySelector(`[data-kind="${kind}"]`)?.remove();
  if (!text) return;
  const dismiss = button("Dismiss", () => notice(kind), { class: "quiet" });
  notices.append(el("div", { class: "notice", "data-kind": kind }, el("p", {}, text), ...actions, dismiss));
}

/** Ask once before something that cannot be undone; resolves to whether to do it. */
export function confirmed(question, consequence, action) {
  return new Promise((resolve) => {
    const dialog = el("dialog", { class: "ask", "aria-labelledby": "ask-title" });
    const answer = (yes) => () => {
      dialog.close();
      resolve(yes);
    };
    dialog.append(
      el("h2", { id: "ask-title" }, question),
      el("p", {}, consequence),
      el("div", { class: "row" }, button("Cancel", answer(false)), button(action, answer(true), { class: "danger" })),
    );
    dialog.addEventListener("cancel", () => resolve(false));
    dialog.addEventListener("close", () => dialog.remove());
    document.body.append(dialog);
    dialog.showModal();
  });
}

/** Copy text and say so on the button for a moment. */
export async function copy(text, onButton) {
  const label = onButton.textContent;
  onButton.textContent = (await toClipboard(text)) ? "Copied" : "Could not copy";
  announce(onButton.textContent);
  setTimeout(() => (onButton.textContent = label), 1500);
}

async function toClipboard(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Over plain HTTP from another machine there is no navigator.clipboard.
    const holder = el("textarea", { class: "unseen", "aria-hidden": "true" });
    holder.value = text;
    const before = document.activeElement;
    document.body.append(holder);
    holder.select();
    const done = document.execCommand("copy");
    holder.remove();
    before?.focus();
    return done;
  }
}
