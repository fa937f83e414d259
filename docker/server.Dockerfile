# The server: ingress, merge workers, queue and bucket set-up. No torch: small, and starts fast.
#   docker build -f docker/server.Dockerfile -t fedqueue-server .        (from the repository's root)

ARG PYTHON_IMAGE=docker.io/library/python:3.12.13-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/fedqueue/bin:$PATH
RUN python -m venv /opt/fedqueue
WORKDIR /src
# Dependencies in a layer of their own: a change of our code does not install them again.
COPY pyproject.toml ./
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
        > /tmp/requirements.txt \
    && pip install -r /tmp/requirements.txt
# .dockerignore lists what comes in: our packages, and nothing that only a developer needs.
COPY . .
RUN pip install --no-deps .

FROM ${PYTHON_IMAGE}
# /definitions is where the `accounts` service of compose.yaml leaves the broker's definitions: a new named
# volume takes the owner of the folder that it covers.
RUN useradd --uid 10001 --create-home fedqueue \
    && install --directory --owner=fedqueue --group=fedqueue /definitions
COPY --from=build /opt/fedqueue /opt/fedqueue
ENV PATH=/opt/fedqueue/bin:$PATH PYTHONUNBUFFERED=1
USER fedqueue
WORKDIR /home/fedqueue
ENTRYPOINT ["fedqueue"]
CMD ["worker"]
