// Sorts and saves tables, shows a chart's values under the pointer, smooths it, changes its axis, and scrolls to sections. The page is complete without it.
"use strict";

for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0], heads = [...table.querySelectorAll("th")];
  const value = (row, column) => row.cells[column].dataset.sort ?? row.cells[column].textContent.trim();
  heads.forEach((head, column) => head.querySelector("button")?.addEventListener("click", () => {
    const ascending = head.getAttribute("aria-sort") !== "ascending";
    const order = (a, b) => {
      const [x, y] = [value(a, column), value(b, column)];
      const difference = x - y;
      return Number.isNaN(difference) ? x.localeCompare(y, "en", { numeric: true }) : difference;
    };
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    body.append(...[...body.rows].sort((a, b) => ascending ? order(a, b) : order(b, a)));
  }));
}

const button = (text, pressed, act) => {
  const made = Object.assign(document.createElement("button"), { type: "button", textContent: text });
  if (pressed !== null) made.setAttribute("aria-pressed", pressed);
  made.addEventListener("click", () => act(made));
  return made;
};
const toggled = made => {
  const on = made.getAttribute("aria-pressed") !== "true";
  made.setAttribute("aria-pressed", on);
  return on;
};

const SMOOTHING = 0.9;  // of an exponential moving average, weights of the first points corrected
function smooth(points) {
  let sum = 0, weight = 0;
  return points.map(([x, y]) => {
    sum = SMOOTHING * sum + (1 - SMOOTHING) * y;
    weight = SMOOTHING * weight + 1 - SMOOTHING;
    return `${(10 * x).toFixed(1)} ${(5 * sum / weight).toFixed(1)}`;
  });
}

function draw(figure) {
  const plot = figure.querySelector(".plot"), lines = [...plot.querySelectorAll(".line")].reverse();
  const places = JSON.parse(plot.querySelector("script").textContent)[3];
  lines.forEach((line, i) => {
    line.dataset.raw ??= line.getAttribute("d");
    line.setAttribute("d", figure.dataset.smooth ? `M${smooth(places[i]).join("L")}` : line.dataset.raw);
  });
  figure.querySelector(".scale-name").textContent = plot.dataset.log === "1" ? ", log scale" : "";
  follow(plot);
}

function follow(plot) {
  if (plot.dataset.followed) return;
  plot.dataset.followed = "yes";
  const area = plot.querySelector(".area");
  const [xLabel, names, colors, places] = JSON.parse(plot.querySelector("script").textContent);
  const hair = Object.assign(document.createElement("div"), { className: "hair" });
  const tip = Object.assign(document.createElement("div"), { className: "tip" });
  const nearest = (points, at) => points.reduce((best, p) => Math.abs(p[0] - at) < Math.abs(best[0] - at) ? p : best);
  const show = event => {
    const box = area.getBoundingClientRect(), at = 100 * (event.clientX - box.left) / box.width;
    const found = places.map(points => nearest(points, at));
    const [left, , step] = found.reduce((best, p) => Math.abs(p[0] - at) < Math.abs(best[0] - at) ? p : best);
    tip.replaceChildren(Object.assign(document.createElement("b"), { textContent: `${xLabel} ${step}` }));
    found.forEach((point, i) => {
      if (Math.abs(point[0] - left) > 3) return;
      const line = Object.assign(document.createElement("span"), { className: `c${colors[i] % 10}`, textContent: point[3] });
      if (names.length > 1) line.append(` ${names[i]}`);
      tip.append(line);
    });
    area.append(hair, tip);
    hair.style.left = `${left}%`;
    const x = left * box.width / 100;
    tip.style.left = `${x + 12 + tip.offsetWidth > box.width ? Math.max(x - 12 - tip.offsetWidth, 12 - plot.firstElementChild.offsetWidth) : x + 12}px`;
  };
  area.addEventListener("pointermove", show);
  area.addEventListener("pointerdown", show);
  area.addEventListener("pointerleave", () => { hair.remove(); tip.remove(); });
}

for (const figure of document.querySelectorAll(".chart")) {
  const tools = Object.assign(document.createElement("span"), { className: "tools" });
  const other = figure.querySelector("template"), plot = figure.querySelector(".plot");
  const longest = Math.max(...JSON.parse(plot.querySelector("script").textContent)[3].map(points => points.length));
  if (plot.querySelector(".line") && longest > 20) {
    tools.append(button("smooth", false, made => {
      toggled(made) ? figure.dataset.smooth = "yes" : delete figure.dataset.smooth;
      draw(figure);
    }));
  }
  if (other) {
    tools.append(button("log", plot.dataset.log === "1", made => {
      toggled(made);
      const shown = figure.querySelector(".plot"), next = other.content.firstElementChild;
      shown.replaceWith(next);
      other.content.append(shown);
      draw(figure);
    }));
  }
  if (tools.childElementCount) figure.querySelector("figcaption").append(tools);
  draw(figure);
}

// The numbers of a table as a file; a sandboxed frame may not save one.
function save(name, kind, text) {
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(new Blob([text], { type: kind })), download: name });
  link.click();
  URL.revokeObjectURL(link.href);
}
function numbers(table) {
  const names = [...table.tHead.rows[0].cells].map(cell => cell.textContent.trim());
  const value = cell => Number.isFinite(parseFloat(cell.dataset.sort)) ? Number(cell.dataset.sort) : cell.firstChild?.textContent.trim() ?? "";
  return [names, [...table.tBodies[0].rows].map(row => [...row.cells].map(value))];
}
const quoted = value => /[",\n]/.test(value) ? `"${String(value).replaceAll('"', '""')}"` : value;
if (window.self === window.top) {
  for (const box of document.querySelectorAll(".scroll:has(> table[aria-label])")) {
    const table = box.firstElementChild, name = table.getAttribute("aria-label").toLowerCase().replace(/\W+/g, "-").slice(0, 40);
    const tools = Object.assign(document.createElement("p"), { className: "tools" });
    tools.append(
      button("CSV", null, () => {
        const [names, rows] = numbers(table);
        save(`${name}.csv`, "text/csv", [names, ...rows].map(row => row.map(quoted).join(",")).join("\n") + "\n");
      }),
      button("JSON", null, () => {
        const [names, rows] = numbers(table);
        save(`${name}.json`, "application/json", JSON.stringify(rows.map(row => Object.fromEntries(row.map((v, i) => [names[i], v]))), null, 1));
      }),
    );
    box.after(tools);
  }
}

// In a sandboxed frame of KFP's (srcdoc) a fragment alone would lead to the parent's address.
const links = [...document.querySelectorAll('a[href^="#"]')];
for (const link of links) {
  link.addEventListener("click", event => {
    event.preventDefault();
    document.getElementById(link.hash.slice(1)).scrollIntoView({ block: "start" });
  });
}
if ("IntersectionObserver" in window) {
  const seen = new IntersectionObserver(entries => entries.filter(e => e.isIntersecting).forEach(entry => {
    links.forEach(link => link.classList.toggle("here", link.hash === `#${entry.target.id}`));
  }), { rootMargin: "-15% 0px -75% 0px" });
  document.querySelectorAll("section[id]").forEach(section => seen.observe(section));
}
