# Octavo on CPUs.   docker build -t octavo .   docker run -p 8000:8000 -v ~/models:/models octavo /models/NAME --kv kv8
FROM python:3.12-slim-bookworm AS build
# Debian keeps one version of a package at a time, so none is named.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/octavo
ENV PATH=/opt/octavo/bin:$PATH
WORKDIR /src
COPY constraints.txt .
# torch without CUDA, before what else depends on it
RUN grep '^torch==' constraints.txt > torch.txt && \
    pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu -r torch.txt
COPY CMakeLists.txt pyproject.toml README.md LICENSE ./
COPY octavo octavo
RUN pip install --no-cache-dir --constraint constraints.txt '.[serve]'

FROM python:3.12-slim-bookworm
# Debian keeps one version of a package at a time, so none is named.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/* && \
    useradd --create-home --uid 1000 octavo
COPY --from=build /opt/octavo /opt/octavo
ENV PATH=/opt/octavo/bin:$PATH
USER 1000
EXPOSE 8000
# SIGTERM: running answers end (--grace), conversations are saved (--session-dir)
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=5m CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health')"]
ENTRYPOINT ["octavo", "serve", "--host", "0.0.0.0"]
