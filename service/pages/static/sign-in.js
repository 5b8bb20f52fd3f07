// An API key, or the code of a sign-in link, becomes a session's cookie.

import { call } from "./api.js";
import { find, notice } from "./dom.js";

async function signIn(given) {
  find("form").inert = true;
  try {
    await call("POST", "/sign-in", given);
    if (location.pathname === "/sign-in") location.replace("/");
    else location.reload(); // to go to the same address would load nothing where it has a #
  } catch (error) {
    notice("sign-in", error.message);
    find("form").inert = false;
    find("key").focus();
  }
}

find("form").addEventListener("submit", (event) => {
  event.preventDefault();
  signIn({ key: find("key").value.trim() });
});

function followLink() {
  // The code stands behind the #, which no browser sends; here it leaves the history too.
  const code = location.pathname === "/sign-in" ? location.hash.slice(1) : "";
  if (code) {
    history.replaceState(null, "", location.pathname);
    signIn({ code });
  }
}

addEventListener("hashchange", followLink);
followLink();
if (!find("form").inert) find("key").focus();
