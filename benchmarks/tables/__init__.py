"""Tables of the measurements in Markdown, made from the committed CSV files alone."""
