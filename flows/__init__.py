"""What Prefect deploys: flows, wiring only; and the command line."""
