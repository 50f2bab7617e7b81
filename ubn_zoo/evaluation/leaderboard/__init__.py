"""The leaderboard: accuracies of the zoo's models beside their size and speed, as CSV, Markdown and a web page."""
