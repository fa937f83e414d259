"""The queues: topology, publisher and consumer, over RabbitMQ (pika) or one SQLite file, faults for tests."""
