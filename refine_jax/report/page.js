"use strict";
// Text of data sets enters the page by textContent alone, never as HTML.
const byId = (id) => document.getElementById(id);
const dataOf = (id) => (byId(id) ? JSON.parse(byId(id).textContent) : null);

function element(name, className, content) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (content !== undefined) made.textContent = content;
  return made;
}

// Light and dark.
const figures = [];
function paintCharts() {
  for (const view of figures) view.request_repaint();
}
byId("theme").addEventListener("change", (event) => {
  document.documentElement.dataset.theme = event.target.value;
  paintCharts();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paintCharts);

// Charts: the library is unpacked, then draws all of them.
async function drawCharts(data) {
  const packed = atob(byId("library").textContent);
  const bytes = Uint8Array.from(packed, (letter) => letter.charCodeAt(0));
  const plain = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(plain).text();
  document.head.append(script);
  for (const views of await Bokeh.embed.embed_items(data.documents, data.items)) {
    figures.push(...views.roots);
  }
  // Where a finger scrolls the page, dragging must not zoom until it is asked for.
  setDragging(!matchMedia("(pointer: coarse)").matches);
}

function setDragging(wanted) {
  for (const view of figures) {
    for (const tool of view.model.toolbar.tools) {
      if (tool.type === "BoxZoomTool") tool.active = wanted;
    }
  }
  for (const button of document.querySelectorAll("button.drag")) {
    button.setAttribute("aria-pressed", String(wanted));
  }
}

if (byId("charts-data") && dataOf("charts-data")) {
  drawCharts(dataOf("charts-data")).catch((error) => {
    for (const place of document.querySelectorAll(".chart")) {
      place.textContent = "This browser cannot draw the curves: " + error.message;
    }
  });
  for (const button of document.querySelectorAll("button.reset")) {
    button.addEventListener("click", () => figures.forEach((view) => view.reset()));
  }
  for (const button of document.querySelectorAll("button.drag")) {
    button.addEventListener("click", () =>
      setDragging(button.getAttribute("aria-pressed") !== "true"));
  }
}

// The method in held-out text.
const number = (value, digits) =>
  value === null || value === undefined ? "–" : value.toFixed(digits).replace("-", "−");
const chance = (value) =>
  value && value < 1e-3 ? value.toExponential(0).replace("-", "−") : number(value, 3);
const shownText = (text) => text.replaceAll("\n", "↵") || "∅";

function methodView({ runs, texts }) {
  for (const run of runs) {
    for (const { rows } of run.evaluations) {
      for (const row of rows) {
        for (const segment of row.segments) segment.texts = texts[segment.texts];
      }
    }
  }
  const at = byId("m-at");
  const run = () => runs[byId("m-run") ? Number(byId("m-run").value) : 0];
  const colour = () => document.querySelector('input[name="m-by"]:checked').value;
  const evaluation = () => run().evaluations[Number(at.value)];

  function chooseRun() {
    at.max = run().evaluations.length - 1;
    at.disabled = run().evaluations.length < 2;
    at.value = at.max;
    const rows = Math.max(...run().evaluations.map((each) => each.rows.length));
    const kept = byId("m-row").value || "0";
    byId("m-row").replaceChildren(
      ...Array.from({ length: rows }, (_, row) => {
        const option = element("option", "", "row " + (row + 1));
        option.value = row;
        return option;
      }));
    byId("m-row").value = Number(kept) < rows ? kept : "0";
    show();
  }

  function show() {
    const now = evaluation();
    byId("m-step").textContent = now.step.toLocaleString("en");
    at.setAttribute("aria-valuetext", "step " + now.step);
    const row = now.rows[Number(byId("m-row").value)];
    const text = byId("m-text");
    text.replaceChildren();
    byId("m-positions").replaceChildren();
    if (!row) return;
    const by = colour();
    text.style.setProperty("--shade", by === "entropy" ? "var(--hot)" : "var(--cool)");
    document.querySelector(".ramp").style.setProperty(
      "--shade", by === "entropy" ? "var(--hot)" : "var(--cool)");
    const most = by === "match" ? 1 : highest(run(), Number(byId("m-row").value));
    byId("m-low").textContent = by === "match" ? "P of " + row.length + " tokens: 0" : "entropy: 0";
    byId("m-high").textContent = by === "match" ? "1" : number(most, 1) + " nats";
    writeText(text, row, by, most);
    byId("m-positions").append(...row.positions.map((each, index) => card(each, index, row)));
    byId("m-title").textContent =
      row.positions.length + " chosen positions and their rollouts of " + row.length + " tokens";
  }

  function highest(of, rowIndex) {
    let most = 0.1;
    for (const each of of.evaluations) {
      for (const segment of each.rows[rowIndex]?.segments ?? []) {
        for (const value of segment.entropy) most = Math.max(most, value ?? 0);
      }
    }
    return most;
  }

  function writeText(text, row, by, most) {
    const starts = new Map(row.positions.map((each, index) => [each.start, index]));
    const inside = new Set(
      row.positions.flatMap((each) => Array.from({ length: row.length }, (_, i) => each.start + i)));
    let done = 0;
    for (const segment of row.segments) {
      if (segment.first > done) {
        text.append(element("span", "gap", " … " + (segment.first - done) + " tokens … "));
      }
      segment.texts.forEach((piece, index) => {
        const place = segment.first + index;
        if (starts.has(place)) {
          const link = element("a", "", String(starts.get(place) + 1));
          link.href = "#position-" + (starts.get(place) + 1);
          link.setAttribute("aria-label", "Position " + link.textContent);
          text.append(link);
        }
        const span = element("span", inside.has(place) ? "start" : "", piece.replaceAll("\n", "↵\n"));
        const value = segment[by][index];
        span.style.setProperty("--a", String(0.62 * Math.min(1, (value ?? 0) / most)));
        span.dataset.about =
          "Token " + place + ": entropy before it " + number(segment.entropy[index], 2) +
          " nats, P of the " + row.length + " tokens from it on " + chance(segment.match[index]);
        text.append(span);
      });
      done = segment.first + segment.texts.length;
    }
    if (done < row.tokens) {
      text.append(element("span", "gap", " … " + (row.tokens - done) + " tokens"));
    }
  }

  function card(position, index, row) {
    const made = element("article", "position");
    made.id = "position-" + (index + 1);
    const title = element("h4", "", String(index + 1));
    const { entropy, match } = figuresAt(row, position.start);
    title.append(element("small", "",
      "at token " + position.start + " · entropy " + number(entropy, 2) + " nats · P of all " +
      row.length + " right " + chance(match)));
    made.append(title, line("truth", position.truth, null));
    position.rollouts.forEach((rollout, sample) => {
      const name = position.rollouts.length > 1 ? "rollout " + (sample + 1) : "rollout";
      const row_ = line(name, rollout.texts, rollout.same);
      const advantages = [...new Set(rollout.advantages.map((each) => number(each, 2)))].join(", ");
      row_.append(element("span", "judged",
        row.reward + " reward " + number(rollout.reward, 3) + " · advantage " + advantages));
      made.append(row_);
    });
    return made;
  }

  function line(name, texts, same) {
    const made = element("div", "line");
    const chips = element("span", "chips");
    texts.forEach((text, index) => {
      const hit = same !== null && same[index];
      chips.append(element("span", hit ? "chip same" : "chip", shownText(text) + (hit ? " ✓" : "")));
    });
    made.append(element("span", "", name), chips);
    return made;
  }

  function figuresAt(row, place) {
    for (const segment of row.segments) {
      const index = place - segment.first;
      if (index >= 0 && index < segment.texts.length) {
        return { entropy: segment.entropy[index], match: segment.match[index] };
      }
    }
    return { entropy: null, match: null };
  }

  function point(event) {
    const span = event.target.closest("span[data-about]");
    if (!span) return;
    byId("m-text").querySelector(".picked")?.classList.remove("picked");
    span.classList.add("picked");
    byId("m-token").textContent = span.dataset.about;
  }

  byId("m-text").addEventListener("pointerover", point);
  byId("m-text").addEventListener("click", point);
  at.addEventListener("input", show);
  byId("m-row").addEventListener("change", show);
  byId("m-run")?.addEventListener("change", chooseRun);
  for (const button of document.querySelectorAll('input[name="m-by"]')) {
    button.addEventListener("change", show);
  }
  chooseRun();
}
if (byId("m-text")) methodView(dataOf("method-data"));

// Answers: search and filters.
function answersView() {
  const cards = [...byId("a-list").children];
  const texts = cards.map((card) => card.textContent.toLowerCase());
  function filter() {
    const words = byId("a-search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const set = byId("a-set").value, kind = byId("a-kind").value;
    let count = 0;
    cards.forEach((card, index) => {
      const fits = (!set || card.dataset.set === set) &&
        (!kind || card.dataset.kind.split(" ").includes(kind)) &&
        words.every((word) => texts[index].includes(word));
      card.hidden = !fits;
      count += fits;
    });
    byId("a-count").textContent = count.toLocaleString("en") + " of " +
      cards.length.toLocaleString("en") + " answers";
  }
  byId("a-form").addEventListener("submit", (event) => event.preventDefault());
  byId("a-search").addEventListener("input", filter);
  for (const id of ["a-set", "a-kind"]) byId(id).addEventListener("change", filter);
}
if (byId("a-list")) answersView();
