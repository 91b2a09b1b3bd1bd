"""What a person asks for: the plan file and the options of its passes. Plain data, no pass code."""
