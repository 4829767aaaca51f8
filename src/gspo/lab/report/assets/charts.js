/* Draws the figures of #chart-data in the colors of the moment: light, dark or print. */
(() => {
  const figures = JSON.parse(document.getElementById("chart-data").textContent);
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const touch = matchMedia("(pointer: coarse)").matches;
  const drawn = new Set();
  const PRINTED = { narrow: 325, wide: 680 };

  /* "@blue/0.2" -> the page's color of that name, a fifth opaque. */
  function colored(value, styles) {
    if (typeof value === "string" && value.startsWith("@")) {
      const [name, alpha] = value.slice(1).split("/");
      const hex = styles.getPropertyValue("--" + name).trim();
      if (alpha === undefined) return hex;
      const parts = [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
      return `rgba(${parts.join(",")},${alpha})`;
    }
    if (Array.isArray(value)) {
      return typeof value[0] === "number" ? value : value.map((item) => colored(item, styles));
    }
    if (value && typeof value === "object") {
      const pairs = Object.entries(value).map(([key, item]) => [key, colored(item, styles)]);
      return Object.fromEntries(pairs);
    }
    return value;
  }

  function layout(own, styles, size) {
    const color = (name) => styles.getPropertyValue("--" + name).trim();
    const shared = {
      gridcolor: color("grid"), linecolor: color("border"), zerolinecolor: color("border"),
      automargin: true, fixedrange: touch,
      title: { standoff: 6, font: { size: 13, color: color("muted") } },
    };
    return {
      template: {
        layout: {
          xaxis: shared,
          yaxis: shared,
          font: { family: "system-ui, sans-serif", size: 13, color: color("text") },
          hoverlabel: {
            bgcolor: color("card"), bordercolor: color("border"),
            font: { color: color("text"), size: 13 },
          },
        },
      },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      margin: { l: 8, r: 12, t: 8, b: 8 },
      hovermode: "x unified",
      dragmode: touch ? false : "zoom",
      legend: { orientation: "h", traceorder: "normal", x: 0, xanchor: "left", y: 1.02, yanchor: "bottom" },
      ...size,
      ...colored(own, styles),
    };
  }

  /* On paper, at a fixed size: a print has no window to fit into. */
  function draw(element, printed) {
    const figure = figures[element.dataset.figure];
    const styles = getComputedStyle(root);
    const height = Number(element.dataset.height);
    const alone = element.closest(".card").matches(".grid > :last-child:nth-child(odd)");
    const width = alone ? PRINTED.wide : PRINTED.narrow;
    const size = printed ? { width, height, autosize: false } : { autosize: true };
    const config = { responsive: true, displayModeBar: false };
    const data = colored(figure.data, styles);
    Plotly.react(element, data, layout(figure.layout, styles, size), config);
    drawn.add(element);
  }

  const charts = [...document.querySelectorAll("[data-figure]")];
  const visible = (element) => element.offsetParent !== null;
  const near = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting && !drawn.has(entry.target)) draw(entry.target, false);
    }
  }, { rootMargin: "400px" });
  charts.forEach((element) => near.observe(element));

  dark.addEventListener("change", () => drawn.forEach((element) => draw(element, false)));
  addEventListener("beforeprint", () => {
    root.classList.add("printing");
    charts.filter(visible).forEach((element) => draw(element, true));
  });
  addEventListener("afterprint", () => {
    root.classList.remove("printing");
    drawn.forEach((element) => draw(element, false));
  });
})();
