"""What passes between stages: Arrow schemas, configuration models, manifests. Imports nothing heavy."""
