"""An estimate, not a part of the gateway: the fast functions inside Envoy, as a Lua filter.

The filter does what the picker does for a request: reads the body, hashes the prompt's blocks, looks
them up in a prefix index of its own, scores each replica by a policy (here the seed `least-tokens`,
written in Lua by hand), writes the order where the load balancer looks for it, and keeps the counts
of what is in flight until the answer has ended. The access log goes to the picker as before, for
that is what learning needs; slow state (speeds, reports of the replicas) would be pushed and is not.
Counts are per worker, and a client that leaves is not taken out of them: a product would need more.
"""

from collections.abc import Sequence

from second_envoy import Alter

from autopoiesis.gateway.resource import EXT_PROC, Config, typed
from autopoiesis.gateway.settings import ENDPOINT_KEY, ENDPOINT_NAMESPACE
from autopoiesis.replicas.fleet import Member

POLICY = """
local addresses = { ADDRESSES }
local n = #addresses
local in_flight, queued, decoding, prefixes, sizes = {}, {}, {}, {}, {}
for r = 1, n do in_flight[r], queued[r], decoding[r], prefixes[r], sizes[r] = 0, 0, 0, {}, 0 end
local sequence, outputs = 0, 128
local flights, number = {}, 0
local bit = require("bit")

local function blocks_of(text)
  local hashes, hash = {}, 5381
  for start = 1, #text - 1023, 1024 do
    for at = start, start + 1023, 4 do
      local a, b, c, d = string.byte(text, at, at + 3)
      hash = bit.tobit(bit.bxor(hash, a + b * 256 + c * 65536 + d * 8388608) * 31 + 7)
    end
    hashes[#hashes + 1] = hash
  end
  return hashes
end

local function hits(r, blocks)
  local known = prefixes[r]
  for i = 1, #blocks do if not known[blocks[i]] then return (i - 1) * 256 end end
  return #blocks * 256
end

function envoy_on_request(request)
  local body = request:body()
  if not body then return end
  local text = body:getBytes(0, body:length())
  local tokens = #text / 4
  local blocks = blocks_of(text)
  local limit = tonumber(string.match(text, '"max_tokens"%s*:%s*(%d+)')) or 4096
  local best, lowest, uncached = 1, math.huge, tokens
  local order = {}
  for r = 1, n do
    local left = tokens - hits(r, blocks)
    local turn = (r - 1 - sequence) % n
    local score = queued[r] + left + 0.2 * decoding[r] + 0.001 * turn
    order[r] = { score, r }
    if score < lowest then best, lowest, uncached = r, score, left end
  end
  table.sort(order, function(a, b) return a[1] < b[1] end)
  local listed = {}
  for i = 1, math.min(n, 6) do listed[i] = addresses[order[i][2]] end
  sequence = sequence + 1
  in_flight[best] = in_flight[best] + 1
  queued[best] = queued[best] + uncached
  for i = 1, #blocks do
    if not prefixes[best][blocks[i]] then prefixes[best][blocks[i]] = true; sizes[best] = sizes[best] + 1 end
  end
  if sizes[best] > 4096 then prefixes[best], sizes[best] = {}, 0 end
  number = number + 1
  flights[number] = { best, uncached, tokens + math.min(outputs, limit) }
  local metadata = request:streamInfo():dynamicMetadata()
  metadata:set("NAMESPACE", "KEY", table.concat(listed, ","))
  metadata:set("autopoiesis", "key", tostring(number))
  metadata:set("autopoiesis", "arm", "least-tokens")
end

function envoy_on_response(response)
  local mine = response:streamInfo():dynamicMetadata():get("autopoiesis")
  if not mine or not mine.key then return end
  local key = tonumber(mine.key)
  local flight = flights[key]
  if not flight then return end
  local r, first = flight[1], true
  for _ in response:bodyChunks() do
    if first then
      queued[r] = math.max(queued[r] - flight[2], 0)
      decoding[r] = decoding[r] + flight[3]
      first = false
    end
  end
  if first then queued[r] = math.max(queued[r] - flight[2], 0)
  else decoding[r] = math.max(decoding[r] - flight[3], 0) end
  in_flight[r] = math.max(in_flight[r] - 1, 0)
  flights[key] = nil
end
"""


def deciding_by_itself(members: Sequence[Member]) -> Alter:
    """Return how to let Envoy decide among these replicas."""
    addresses = ", ".join(f'"{member.address}"' for member in members)
    script = POLICY.replace("ADDRESSES", addresses)
    script = script.replace("NAMESPACE", ENDPOINT_NAMESPACE).replace("KEY", ENDPOINT_KEY)
    lua = typed(
        EXT_PROC,
        "extensions.filters.http.lua.v3.Lua",
        default_source_code={"inline_string": script},
    )

    def alter(manager: Config, _: list[Config]) -> None:
        kept = [one for one in manager["http_filters"] if one["name"] != EXT_PROC]
        manager["http_filters"] = [lua, *kept]

    return alter
