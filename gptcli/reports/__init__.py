"""The report of a run or an evaluation: JSON, Markdown and HTML."""
