"use strict";

// Rank heatmap: the slider shows the ranks after an earlier allocation.
for (const box of document.querySelectorAll("[data-slider]")) {
  const slider = box.querySelector("input[type=range]");
  if (!slider) continue;
  const data = JSON.parse(box.querySelector(".frames").textContent);
  const body = [...box.querySelectorAll("tbody tr")].map((row) => ({
    cells: [...row.querySelectorAll("td:not(.sum)")].map((cell) => ({
      cell, members: cell.dataset.m ? cell.dataset.m.split(",").map(Number) : null,
    })),
    sum: row.querySelector(".sum"),
  }));
  const foot = [...box.querySelectorAll("tfoot td")];
  const output = box.querySelector("output");
  slider.addEventListener("input", () => {
    const ranks = data.ranks[slider.value];
    const totals = foot.map(() => 0);
    for (const row of body) {
      let across = 0;
      row.cells.forEach(({cell, members}, i) => {
        if (!members) return;
        const value = members.reduce((sum, m) => sum + ranks[m], 0);
        cell.textContent = value;
        cell.className = "h" + Math.round(data.shades * value / data.top);
        across += value;
        totals[i] += value;
      });
      row.sum.textContent = across;
      totals[totals.length - 1] += across;
    }
    foot.forEach((cell, i) => { cell.textContent = totals[i].toLocaleString("en"); });
    output.textContent = data.steps[slider.value].toLocaleString("en");
    slider.setAttribute("aria-valuetext", "step " + output.textContent);
  });
}

// Module table: sort by any column, filter by any text.
for (const box of document.querySelectorAll("[data-modules]")) {
  const body = box.querySelector("tbody");
  const heads = [...box.querySelectorAll("thead th")];
  const value = (row, at) => {
    const cell = row.cells[at];
    if (!("v" in cell.dataset)) return cell.textContent;
    const number = parseFloat(cell.dataset.v);
    return Number.isNaN(number) ? -Infinity : number;
  };
  heads.forEach((head, at) => head.firstElementChild.addEventListener("click", () => {
    const first = head.firstElementChild.dataset.kind === "number" ? "descending" : "ascending";
    const other = first === "ascending" ? "descending" : "ascending";
    const order = head.getAttribute("aria-sort") === first ? other : first;
    heads.forEach((h) => h.setAttribute("aria-sort", h === head ? order : "none"));
    const sign = order === "ascending" ? 1 : -1;
    const rows = [...body.rows].map((row) => [value(row, at), row]);
    rows.sort(([a], [b]) => sign * (typeof a === "string" ? a.localeCompare(b) : a === b ? 0 : a < b ? -1 : 1));
    body.append(...rows.map(([, row]) => row));
  }));
  const count = box.querySelector("[data-count]");
  box.querySelector("input[type=search]").addEventListener("input", (event) => {
    const words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of body.rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      shown += !row.hidden;
    }
    count.textContent = shown === body.rows.length ? shown + " modules" : shown + " of " + body.rows.length + " modules";
  });
}

// CSV files lie in the page, gzipped.
for (const button of document.querySelectorAll("[data-csv]")) {
  button.addEventListener("click", async () => {
    const packed = Uint8Array.from(atob(document.getElementById(button.dataset.csv).textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const blob = new Blob([await new Response(stream).arrayBuffer()], {type: "text/csv"});
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = button.dataset.file;
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  });
}
