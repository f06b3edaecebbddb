"use strict";
// The page is complete without this: it opens what a fragment names, moves through the matrix, and copies commands.
(() => {
  document.documentElement.classList.add("scripted");

  const show = () => {
    let name = location.hash.slice(1);
    try { name = decodeURIComponent(name); } catch { /* as it is */ }
    const target = name && document.getElementById(name);
    if (!target) return;
    const all = document.getElementById("all");
    if (all && !all.checked && target.closest("div.given")) all.checked = true;
    for (let at = target; at; at = at.parentElement) if (at.localName === "details") at.open = true;
    const summary = target.classList.contains("inside") && target.parentElement.querySelector(":scope > summary");
    if (summary) summary.focus({ preventScroll: true });
    (summary || target).scrollIntoView();
  };
  addEventListener("hashchange", show);
  // The same link twice changes no fragment, but what it leads to may have been closed since.
  addEventListener("click", (event) => {
    const link = event.target.closest && event.target.closest('a[href^="#"]');
    if (link && link.getAttribute("href") === location.hash) { event.preventDefault(); show(); }
  });
  show();

  const table = document.querySelector(".matrix");
  if (table.querySelector("a")) {
    // The table is one stop of the Tab key; arrows move inside.
    const rows = () => [...table.rows].filter((row) => row.checkVisibility());
    const links = [...table.querySelectorAll("a")];
    let current = table.querySelector("td.cell a") || links[0];
    for (const each of links) each.tabIndex = each === current ? 0 : -1;
    const visit = (link) => {
      current.tabIndex = -1;
      current = link;
      current.tabIndex = 0;
    };
    const step = (link, down, right) => {
      const shown = rows();
      let row = shown.indexOf(link.closest("tr"));
      let column = link.closest("td, th").cellIndex;
      for (;;) {
        row += down;
        column += right;
        if (!shown[row] || !shown[row].cells[column]) return null;
        const next = shown[row].cells[column].querySelector("a");
        if (next) return next;
      }
    };
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    table.addEventListener("keydown", (event) => {
      const link = event.target.closest("a");
      if (!link || event.altKey || event.ctrlKey || event.metaKey) return;
      let next = null;
      if (moves[event.key]) next = step(link, ...moves[event.key]);
      else if (event.key === "Home" || event.key === "End") {
        const found = link.closest("tr").querySelectorAll("a");
        next = found[event.key === "Home" ? 0 : found.length - 1];
      } else return;
      event.preventDefault();
      if (next) { visit(next); next.focus(); }
    });
    table.addEventListener("focusin", (event) => {
      const link = event.target.closest("a");
      if (link) visit(link);
    });
    let crossed = [];
    const cross = (event) => {
      for (const each of crossed) each.classList.remove("here");
      const cell = event.target.closest("td.cell");
      table.classList.toggle("crossed", Boolean(cell));
      crossed = cell ? [...table.rows].map((row) => row.cells[cell.cellIndex]).filter(Boolean) : [];
      for (const each of crossed) each.classList.add("here");
    };
    table.addEventListener("mouseover", cross);
    table.addEventListener("focusin", cross);
  }

  for (const words of document.querySelectorAll(".command")) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "copy";
    button.textContent = "Copy";
    button.setAttribute("aria-label", `Copy: ${words.textContent}`);
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(words.textContent);
        button.textContent = "Copied";
        setTimeout(() => { button.textContent = "Copy"; }, 1500);
      } catch {
        getSelection().selectAllChildren(words);
      }
    });
    words.after(button);
  }
})();
