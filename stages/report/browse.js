(() => {
  "use strict";
  for (const root of document.querySelectorAll("[data-scopes]")) {
    const panels = [...root.querySelectorAll("details[data-scope]")];
    const select = root.querySelector("select");
    const show = () => panels.forEach((panel, i) => {
      panel.hidden = i !== select.selectedIndex;
      panel.open = true;
      panel.querySelector("summary").hidden = true;
    });
    if (panels.length > 1) {
      root.querySelector(".controls").hidden = false;
      select.addEventListener("change", show);
      show();
    }
  }
  for (const root of document.querySelectorAll("[data-browser]")) {
    const columns = root.querySelector(".columns");
    const control = (name) => root.querySelector(`[name=${name}]`);
    const sides = [...root.querySelectorAll(".column")].map((column) => ({
      column,
      count: column.querySelector("[data-count]"),
      pairs: [...column.querySelectorAll(".pair")].map((node) => ({
        node,
        language: node.dataset.language,
        score: node.dataset.score === "" ? NaN : Number(node.dataset.score),
        text: node.textContent.toLowerCase(),
      })),
    }));
    const update = () => {
      const language = control("language").value;
      const which = control("which").value;
      const words = control("search").value.toLowerCase().split(/\s+/).filter(Boolean);
      const sign = control("order").value === "up" ? 1 : -1;
      columns.classList.toggle("one", which !== "both");
      for (const side of sides) {
        side.column.hidden = which !== "both" && side.column.dataset.side !== which;
        side.pairs.sort((a, b) =>
          Number.isNaN(a.score) - Number.isNaN(b.score) || sign * (a.score - b.score) || 0);
        let shown = 0;
        for (const pair of side.pairs) {
          const match = (!language || pair.language === language) && words.every((word) => pair.text.includes(word));
          pair.node.hidden = !match;
          shown += match;
          side.column.append(pair.node);
        }
        side.count.textContent = String(shown);
      }
    };
    root.querySelector(".controls").hidden = false;
    root.querySelectorAll("select, input").forEach((node) => node.addEventListener("input", update));
    update();
  }
})();
