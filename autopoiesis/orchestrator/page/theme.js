// Light, dark, or as the system: the choice is kept in this browser.

const CHOICES = ["system", "light", "dark"];

export function themeButton(button) {
  let choice = localStorage.getItem("theme") ?? "system";
  const apply = () => {
    if (choice === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = choice;
    button.setAttribute("aria-label", `Colour theme: ${choice === "system" ? "as the system" : choice}`);
    button.title = button.getAttribute("aria-label");
  };
  button.addEventListener("click", () => {
    choice = CHOICES[(CHOICES.indexOf(choice) + 1) % CHOICES.length];
    localStorage.setItem("theme", choice);
    apply();
  });
  apply();
}
