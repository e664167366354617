"""Pictures of the measurements, drawn from the committed CSV files alone."""
