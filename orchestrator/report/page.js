"use strict";
// Everything is on the page without this script; it only shows one chart of several, sorts a table, and opens its end.

for (const form of document.querySelectorAll("form.choosing")) {
  const charts = [...document.getElementById(form.dataset.of).querySelectorAll(".charts")];
  const list = form.querySelector("select");
  const show = () => {
    for (const chart of charts) chart.hidden = chart.dataset.name !== list.value;
  };
  form.hidden = false;
  form.addEventListener("change", show);
  form.addEventListener("submit", (event) => event.preventDefault());
  list.value = charts[0].dataset.name;
  show();
}

for (const button of document.querySelectorAll("button[data-more]")) {
  const more = document.getElementById(button.dataset.more);
  more.hidden = true;
  button.hidden = false;
  button.addEventListener("click", () => {
    more.hidden = false;
    button.remove();
  });
}

const sortValue = (row, column) => {
  const cell = row.cells[column];
  const text = cell.dataset.sort ?? cell.textContent.trim();
  const number = parseFloat(text);
  return Number.isNaN(number) || /^[A-Za-z]/.test(text) ? text : number;
};

const sortBy = (table, column, descending) => {
  const rows = [...table.tBodies].flatMap((body) => [...body.rows]);
  rows.sort((a, b) => {
    const [x, y] = [sortValue(a, column), sortValue(b, column)];
    if (x === "" || y === "") return (x === "") - (y === "");
    const order = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y), "en", { numeric: true });
    return descending ? -order : order;
  });
  const sizes = [...table.tBodies].map((body) => body.rows.length);
  [...table.tBodies].forEach((body, index) => body.append(...rows.splice(0, sizes[index])));
};

for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const descending = head.getAttribute("aria-sort") !== "descending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      sortBy(table, column, descending);
    });
  });
}
