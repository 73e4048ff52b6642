"""The GPU side: a Celery worker that supervises runs, and the engine that a run executes."""
