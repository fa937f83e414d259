"""The chaos run: real servers, real processes, and everything that can die is killed while updates flow.

    make chaos SECONDS=600 SEED=7

plan.py         what is done to whom and when: a pure function of the seed
deployment.py   the system under test: RabbitMQ, Redis, an S3 server, 2 ingresses, 3 merge workers, 8 sites
processes.py    one process under a supervisor that starts it again, as systemd does
network.py      the line between a site and the servers, which can be cut
site.py         a light site: the real agent with a toy trainer, over a broker and a store that fail now and then
journal.py      what a site writes down so that it survives kill -9: the basis of the accounting
killer.py       carries out the plan
accounting.py   the log against the journals: nothing lost, nothing counted twice
report.py       the tables
test_chaos.py   the run

What the run does not do: there is one RabbitMQ node and one store daemon on one disk, so no server loses its disk
or its majority; no clock is moved; no disk fills up; the machine itself never loses power, so what a process
wrote but did not flush to disk survives its kill; workers and ingresses are killed but their network is not
cut; payloads are a few KB.
"""
