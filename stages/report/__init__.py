"""One self-contained HTML file that shows what a run did: from the tables, without torch."""
