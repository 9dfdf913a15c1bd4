// What the theme leaves out for keyboards and screen readers.
function complete() {
  for (const head of document.querySelectorAll("th:empty")) head.replaceWith(document.createElement("td"));
  document.querySelectorAll(".md-code__nav").forEach((nav, n) => nav.setAttribute("aria-label", `Code ${n + 1}`));
  for (const part of document.querySelectorAll(".md-typeset__scrollwrap, pre > code"))
    if (part.scrollWidth > part.clientWidth) part.tabIndex = 0;
}
new MutationObserver(complete).observe(document.body, { childList: true, subtree: true });
complete();
