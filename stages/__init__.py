"""What each stage computes, in the order data flows. Knows no run directory and no command line."""
