"""What people see of a run at work: display, sessions in the store, metrics, timeline."""
