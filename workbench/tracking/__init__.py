"""What was measured: MLflow runs, and tables made from them."""
