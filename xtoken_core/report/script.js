// Sorts tables, shows a chart's values under the pointer, and scrolls to sections. The page is complete without it.
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

for (const plot of document.querySelectorAll(".plot")) {
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
