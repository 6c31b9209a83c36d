"""Where a step's time goes, operator by operator."""
