// Gives each command a button that copies it. Without scripts, a click on a command selects it.
for (const code of document.querySelectorAll(".commands code")) {
  const button = document.createElement("button");
  const say = (word) => {
    button.textContent = word;
    button.setAttribute("aria-label", word + ": " + code.textContent);
  };
  button.type = "button";
  say("Copy");
  button.onclick = async () => {
    getSelection().selectAllChildren(code);
    try { await navigator.clipboard.writeText(code.textContent); } catch { document.execCommand("copy"); }
    say("Copied");
    setTimeout(say, 2000, "Copy");
  };
  code.after(button);
}
