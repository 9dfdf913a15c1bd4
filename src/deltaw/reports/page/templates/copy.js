// Add a copy button to each command. Without scripts, clicking a command selects it.
for (const code of document.querySelectorAll(".commands code")) {
  const button = document.createElement("button");
  const setLabel = (label) => {
    button.textContent = label;
    button.setAttribute("aria-label", label + ": " + code.textContent);
  };
  button.type = "button";
  setLabel("Copy");
  button.onclick = async () => {
    getSelection().selectAllChildren(code);
    try { await navigator.clipboard.writeText(code.textContent); } catch { document.execCommand("copy"); }
    setLabel("Copied");
    setTimeout(setLabel, 2000, "Copy");
  };
  code.after(button);
}
