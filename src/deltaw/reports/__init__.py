"""What a person looks at after a run: tables and figures of an adapter, the model card, the run's page."""
