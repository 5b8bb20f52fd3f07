// What every page has around it: who is signed in, the way to the other pages, and the way out.

import { call, openSession } from "./api.js";
import { button, el, find, notice } from "./dom.js";

const ROLES = ["user", "rater", "operator"];
const FACES = [
  { path: "/", name: "Chat", role: "user" },
  { path: "/rate", name: "Rate", role: "rater" },
  { path: "/board", name: "Board", role: "operator" },
];

/** Fill the header; resolves to the session, or to null after saying what is wrong. */
export async function openPage() {
  // A page that comes back from the browser's memory may be a former user's.
  addEventListener("pageshow", (event) => event.persisted && location.reload());
  let session;
  try {
    session = await openSession();
  } catch (error) {
    const again = button(error.status === 401 ? "Sign in" : "Try again", () => location.reload(), { class: "strong" });
    notice("session", error.message, again);
    return null;
  }
  const mine = FACES.filter((face) => ROLES.indexOf(face.role) <= ROLES.indexOf(session.role));
  if (mine.length > 1) {
    find("faces").append(
      ...mine.map(({ path, name }) =>
        el("a", { href: path, "aria-current": path === location.pathname ? "page" : null }, name),
      ),
    );
  }
  find("account").append(
    el("span", { class: "who", dir: "auto" }, session.label || session.role),
    button("Sign out", signOut, { class: "quiet" }),
  );
  return session;
}

async function signOut() {
  try {
    await call("DELETE", "/v1/session");
  } catch (error) {
    if (error.status !== 401) return notice("session", `You are still signed in. ${error.message}`);
  }
  location.assign("/");
}
