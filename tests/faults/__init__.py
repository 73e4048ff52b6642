"""What must not happen to a job, whatever happens to the machines.

Each test takes a real service (PostgreSQL, a broker, an S3 server, the API, two workers), breaks a part of it while
real jobs run, and looks at what the jobs came to. `make test` runs them in a short form; `make test-faults` in the long
one, which prints one JSON object on its last line.
"""
