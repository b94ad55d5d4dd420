// Before the page is drawn: the colours that were chosen, where they are not the system's.

const theme = localStorage.getItem("octavo.theme");
if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
