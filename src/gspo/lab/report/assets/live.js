/* While the run is alive: load the page anew, and keep place, pickers and open parts. */
(() => {
  const state = JSON.parse(document.getElementById("live-data").textContent);
  const key = "gspo report " + location.pathname;
  const note = document.getElementById("live-note");
  const button = document.getElementById("live-pause");
  const keeps = [...document.querySelectorAll("select[id], details[id]")];
  const chosen = new Set();  /* pickers that somebody moved: the others show the latest */
  let paused = false;

  function save() {
    const kept = { y: scrollY, paused, parts: {} };
    for (const part of keeps) {
      if (part.tagName === "DETAILS") kept.parts[part.id] = part.open;
      else if (chosen.has(part.id)) kept.parts[part.id] = part.selectedIndex;
    }
    try { sessionStorage.setItem(key, JSON.stringify(kept)); } catch { /* private mode */ }
  }

  function restore() {
    let kept = null;
    try { kept = JSON.parse(sessionStorage.getItem(key)); } catch { /* none, or not ours */ }
    if (!kept || !kept.parts) return;
    for (const part of keeps) {
      const value = kept.parts[part.id];
      if (value === undefined) continue;
      if (part.tagName === "DETAILS") part.open = value;
      else if (value < part.length) {
        part.selectedIndex = value;
        part.dispatchEvent(new Event("change"));
      }
    }
    paused = Boolean(kept.paused);
    scrollTo(0, kept.y);
  }

  function tell() {
    const age = Date.now() / 1000 - state.written;
    const lost = age > state.patience;
    if (lost) note.textContent = "No news for a long time: the run was stopped, or is very slow.";
    else note.textContent = paused ? "Updates are paused." : `Loads anew every ${state.every} s.`;
    button.textContent = paused ? "Go on" : "Pause";
    button.hidden = lost;
    return lost;
  }

  keeps.forEach((part) => part.addEventListener("change", () => chosen.add(part.id)));
  history.scrollRestoration = "manual";
  restore();
  addEventListener("pagehide", save);
  if (!state.live) return;
  let touched = 0;
  for (const kind of ["pointerdown", "keydown", "wheel", "touchmove"]) {
    addEventListener(kind, () => { touched = Date.now(); }, { passive: true });
  }
  button.addEventListener("click", () => { paused = !paused; tell(); save(); });
  tell();
  let loaded = Date.now();
  setInterval(() => {
    /* Not while somebody reads a tooltip, scrolls or looks elsewhere. */
    const due = Date.now() - loaded > 1000 * state.every;
    const idle = Date.now() - touched > 3000 && document.getElementById("tip")?.hidden !== false;
    if (tell() || paused || !due || !idle || document.hidden) return;
    loaded = Date.now();
    save();
    location.reload();
  }, 500);
})();
