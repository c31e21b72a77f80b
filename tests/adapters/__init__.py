"""The adapter core against peft: one table of cases, one test function a property."""
