# What needs torch: a site's agent, the evaluation worker (which writes releases, so with ONNX), `fedqueue job submit`
# and `fedqueue predict`.
#   docker build -f docker/site.Dockerfile -t fedqueue-site .        (from the repository's root)
#
# The index's newest torch brings its CUDA packages, several gigabytes, and works without a GPU, too. For the
# small CPU build pass its index:  --build-arg PIP_EXTRA_INDEX_URL=<PyTorch's CPU wheel index>

ARG PYTHON_IMAGE=docker.io/library/python:3.12.13-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ARG PIP_EXTRA_INDEX_URL=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/fedqueue/bin:$PATH
RUN python -m venv /opt/fedqueue
WORKDIR /src
# Dependencies in a layer of their own: a change of our code does not install them again.
COPY pyproject.toml ./
RUN python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; print(*p['dependencies'], *p['optional-dependencies']['site'], *p['optional-dependencies']['export'], sep='\n')" \
        > /tmp/requirements.txt \
    && pip install -r /tmp/requirements.txt
COPY . .
RUN pip install --no-deps ".[site,export]"

FROM ${PYTHON_IMAGE}
# /state holds the outbox: an update that was trained and not yet confirmed survives a new container there.
RUN useradd --uid 10001 --create-home fedqueue \
    && install --directory --owner=fedqueue --group=fedqueue /state
COPY --from=build /opt/fedqueue /opt/fedqueue
ENV PATH=/opt/fedqueue/bin:$PATH PYTHONUNBUFFERED=1 FEDQUEUE_SITE_STATE=/state
USER fedqueue
WORKDIR /home/fedqueue
ENTRYPOINT ["fedqueue"]
CMD ["site", "run", "--help"]
