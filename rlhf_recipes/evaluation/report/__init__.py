"""The report of an evaluation: verdict, plots, HTML, the table over seeds."""
