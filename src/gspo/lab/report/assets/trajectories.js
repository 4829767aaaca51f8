/* Browses #trajectory-data. Model output only ever becomes text nodes. */
(() => {
  const source = document.getElementById("trajectory-data");
  if (!source) return;
  const runs = JSON.parse(source.textContent);
  const box = document.getElementById("trajectories");
  const tip = document.getElementById("tip");
  const selects = ["run", "step", "group"].map((name) => document.getElementById("pick-" + name));
  const sign = (value) => (value < 0 ? "−" : value > 0 ? "+" : "");
  const signed = (value, digits) => (
    sign(value) + (value === 0 ? "0" : Math.abs(value).toPrecision(digits))
  );
  let marked = null;

  function make(tag, name, text) {
    const element = document.createElement(tag);
    if (name) element.className = name;
    if (text !== undefined) element.textContent = text;
    return element;
  }

  /* Keeps the choice where it can. */
  function fill(select, labels, first) {
    const before = select.selectedIndex;
    select.replaceChildren(...labels.map((label, at) => new Option(label, at)));
    select.selectedIndex = before >= 0 && before < labels.length ? before : first;
  }

  function chosen() {
    const run = runs[selects[0].selectedIndex];
    const step = run.steps[selects[1].selectedIndex];
    return { run, group: step.groups[selects[2].selectedIndex] };
  }

  function refill(from) {
    const run = runs[selects[0].selectedIndex];
    if (from < 1) fill(selects[1], run.steps.map((step) => `step ${step.step}`), run.steps.length - 1);
    const groups = run.steps[selects[1].selectedIndex].groups;
    if (from < 2) fill(selects[2], groups.map((group) => `group ${group.group}`), 0);
    show();
  }

  function token(part, at, scale) {
    const text = part.tokens[at];
    const element = make("span", "tok", text === "" ? "▫" : text.replace(/\n/g, "↵\n"));
    element.dataset.at = at;
    const d = part.d ? part.d[at] : null;
    if (d !== null && scale) {
      element.classList.add(d < 0 ? "down" : "up");
      element.style.setProperty("--a", (0.75 * Math.min(1, Math.abs(d) / scale)).toFixed(3));
    }
    return element;
  }

  function turn(part, scale) {
    const out = [make("p", "role", part.role)];
    if (!part.tokens) return [...out, make("div", "text", part.text)];
    const line = make("div", "tokens");
    line.tabIndex = 0;
    line.setAttribute("role", "group");
    line.setAttribute("aria-label", "Sampled tokens. Arrow keys go from token to token.");
    line.part_ = part;
    line.append(...part.tokens.map((_, at) => token(part, at, scale)));
    if (part.more) line.append(` … ${part.more} more tokens`);
    return [...out, line];
  }

  function facts(item) {
    const row = make("div", "facts");
    const chip = (text, name = "chip") => row.append(make("span", name, text));
    chip(`reward ${item.reward === null ? "not finite" : item.reward}`);
    if (item.advantage !== null) chip(`A = ${signed(item.advantage, 3)}`);
    if (!item.log_ratios) {
      chip(item.advantage === 0 ? "no gradient: A = 0" : "no record of its update");
      return row;
    }
    item.log_ratios.forEach((l, i) => {
      const name = item.log_ratios.length > 1 ? `turn ${i + 1}: ` : "";
      chip(`${name}s = ${Math.exp(l).toPrecision(6)} (l = ${signed(l, 3)})`);
      const [clipped, trained] = [item.clipped[i], item.trained[i]];
      if (!clipped) chip(`${name}not clipped`);
      else if (clipped === trained) chip(`${name}clipped`, "chip clipped");
      else chip(`${name}${clipped} of ${trained} tokens clipped`, "chip clipped");
    });
    chip(`update ${item.update + 1} of the step`);
    return row;
  }

  function show() {
    const { run, group } = chosen();
    hide();
    const prompt = make("div", "card");
    prompt.append(make("h3", "", "Prompt"), ...group.prompt.flatMap((part) => turn(part)));
    const cards = group.items.map((item) => {
      const card = make("div", "card completion");
      card.append(facts(item), ...item.parts.flatMap((part) => turn(part, run.scale)));
      return card;
    });
    const note = `${group.items.length} of the group's ${group.size} trajectories.`;
    box.replaceChildren(prompt, make("p", "note", note), ...cards);
    const scale = run.scale ? run.scale.toPrecision(2) : "";
    document.getElementById("legend").hidden = !run.scale;
    document.getElementById("scale-low").textContent = `−${scale} nats: less likely now`;
    document.getElementById("scale-high").textContent = `+${scale}: more likely`;
  }

  function hide() {
    if (marked) marked.classList.remove("on");
    marked = null;
    tip.hidden = true;
  }

  function point(element) {
    hide();
    marked = element;
    element.classList.add("on");
    const part = element.parentElement.part_;
    const at = Number(element.dataset.at);
    const p = part.logprobs[at];
    const d = part.d ? part.d[at] : null;
    const text = JSON.stringify(part.tokens[at]);
    const chance = p === null ? "" : ` (${(100 * Math.exp(p)).toPrecision(3)} %)`;
    const lines = [
      `token ${at + 1}: ${text}, id ${part.ids[at]}`,
      p === null ? "log-prob when sampled: not finite" : `log-prob when sampled ${String(p).replace("-", "−")}${chance}`,
      d === null ? "not trained on" : `d_t = ${signed(d, 3)}, ratio ${Math.exp(d).toPrecision(4)}`,
    ];
    tip.replaceChildren(...lines.map((line) => make("div", "", line)));
    tip.hidden = false;
    const place = element.getClientRects()[0];
    const left = Math.min(place.left, document.documentElement.clientWidth - tip.offsetWidth - 8);
    const above = place.top - tip.offsetHeight - 6;
    tip.style.left = `${Math.max(8, left) + scrollX}px`;
    tip.style.top = `${(above > 4 ? above : place.bottom + 6) + scrollY}px`;
  }

  const tokenAt = (event) => event.target.closest?.(".tok");
  box.addEventListener("pointerover", (event) => {
    const element = tokenAt(event);
    if (element) point(element);
    else if (event.pointerType === "mouse") hide();
  });
  box.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && hide());
  box.addEventListener("click", (event) => tokenAt(event) && point(tokenAt(event)));
  box.addEventListener("focusout", hide);
  box.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === "Escape") hide();
    if (!step || !event.target.classList.contains("tokens")) return;
    const all = event.target.querySelectorAll(".tok");
    const inside = marked && marked.parentElement === event.target;
    const at = inside ? Number(marked.dataset.at) + step : 0;
    if (all[at]) point(all[at]);
    event.preventDefault();
  });
  selects.forEach((select, at) => select.addEventListener("change", () => refill(at)));
  fill(selects[0], runs.map((run) => run.label), 0);
  refill(0);
})();
