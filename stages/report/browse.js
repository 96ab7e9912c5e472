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
  for (const root of document.querySelectorAll("[data-languages]")) {
    const rows = [...root.querySelectorAll("[data-language]")];
    root.querySelector(".controls").hidden = false;
    root.querySelector("input").addEventListener("input", (event) => {
      const codes = event.target.value.toLowerCase().split(/[\s,]+/).filter(Boolean);
      for (const row of rows) {
        const match = codes.some((code) => row.dataset.language.toLowerCase().startsWith(code));
        row.hidden = codes.length > 0 && !match;
        row.classList.toggle("found", match);
      }
      if (codes.length) root.querySelector("details").open = true;
    });
  }
  for (const root of document.querySelectorAll("[data-browser]")) {
    const SHOWN = 20;
    let page = 0;
    const pages = root.querySelector(".pages");
    const [before, after] = pages.querySelectorAll("button");
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
      const each = which === "both" ? SHOWN / 2 : SHOWN;
      let last = 0;
      columns.classList.toggle("one", which !== "both");
      for (const side of sides) {
        side.column.hidden = which !== "both" && side.column.dataset.side !== which;
        side.pairs.sort((a, b) =>
          Number.isNaN(a.score) - Number.isNaN(b.score) || sign * (a.score - b.score) || 0);
        let found = 0;
        for (const pair of side.pairs) {
          const match = (!language || pair.language === language) && words.every((word) => pair.text.includes(word));
          pair.node.hidden = !match || Math.floor(found / each) !== page;
          found += match;
          side.column.append(pair.node);
        }
        side.count.textContent = String(found);
        if (!side.column.hidden) last = Math.max(last, Math.ceil(found / each) - 1);
      }
      if (page > last) {
        page = last;
        update();
        return;
      }
      pages.querySelector("[data-page]").textContent = `Page ${page + 1} of ${last + 1}`;
      before.disabled = page === 0;
      after.disabled = page === last;
      pages.hidden = last === 0;
    };
    const turn = (step) => {
      page += step;
      update();
      pages.scrollIntoView({ block: "nearest" });
    };
    root.querySelector(".controls").hidden = false;
    root.querySelectorAll("select, input").forEach((node) => node.addEventListener("input", () => turn(-page)));
    before.addEventListener("click", () => turn(-1));
    after.addEventListener("click", () => turn(1));
    update();
  }
})();
