"""Jobs on machines that break.

Each test breaks a part of a real service (PostgreSQL, a broker, an S3 server, the API, two workers) while real jobs
run, and compares the jobs' results with those of jobs without faults. `make test` runs the short form, and
`make test-faults` the long one, which prints one JSON object on its last line.
"""
