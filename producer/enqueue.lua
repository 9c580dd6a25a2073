-- enqueue: add a chunk of one batch's items to the queue of their flow. Doing it again adds only what is
-- missing: an item that waits, runs or is done stays as it is.
--
-- KEYS     as in gate.lua
-- ARGV[2]  now      us, tests only; '' = Redis' TIME
-- ARGV[3]  batch    id of the batch
-- ARGV[4]  flow     name of the flow
-- ARGV[5]  spacing  places between two items of the batch: 1000 / weight
-- ARGV[6]  index, payload, index, payload, ...  at most 1000 pairs
--
-- Returns {added, done}: how many are new in the queue, how many were done before.
-- Start-time fair queueing: a batch joins at the queue's virtual time and its items stand `spacing` apart,
-- so a short batch interleaves with a long one.

local batch, flow, spacing = ARGV[3], ARGV[4], tonumber(ARGV[5])
local limit = string.match(GATE, '{(.-)}')
local key, done_key = ROOT .. 'batch:' .. batch, ROOT .. 'done:' .. batch

local state = load('')
local now = clock(state)
if state.gen > 0 then extend_after_stall(state, now) end

-- The items of the call that are not done, as index -> payload pairs in order.
local function missing()
  local asks, wanted = {}, {}
  if redis.call('EXISTS', done_key) == 1 then
    for i = 6, #ARGV, 2 do
      asks[#asks + 1], asks[#asks + 2], asks[#asks + 3] = 'GET', 'u1', ARGV[i]
    end
  end
  local bits = #asks > 0 and redis.call('BITFIELD', done_key, unpack(asks)) or {}
  for i = 6, #ARGV, 2 do
    if bits[(i - 4) / 2] ~= 1 then
      wanted[#wanted + 1], wanted[#wanted + 2] = ARGV[i], ARGV[i + 1]
    end
  end
  return wanted
end

local wanted = missing()
local found = redis.call('HMGET', key, 'next', 'left')
local place = math.max(state.place, tonumber(found[1] or '') or 1)
local pairs_, places = {}, {}
for i = 1, #wanted, 2 do
  local id = '{' .. limit .. '}:' .. batch .. ':' .. wanted[i]
  pairs_[#pairs_ + 1], pairs_[#pairs_ + 2] = 'arq:job:' .. id, wanted[i + 1]
  places[#places + 1], places[#places + 2] = whole(place), id
  place = place + spacing
end
local added = 0
if #wanted > 0 then
  if redis.call('MSETNX', unpack(pairs_)) == 0 then
    for i = 1, #pairs_, 2 do redis.call('SETNX', pairs_[i], pairs_[i + 1]) end
  end
  added = redis.call('ZADD', queue_of(flow), 'NX', unpack(places))
end
if added > 0 then
  if (tonumber(found[2] or '') or 0) <= 0 then
    for _, each in ipairs({ key, done_key, ROOT .. 'out:' .. batch, ROOT .. 'base:' .. batch }) do
      redis.call('PERSIST', each)
    end
  end
  redis.call('HSET', key, 'next', whole(place))
  redis.call('HINCRBY', key, 'left', added)
  local room = math.max(1, math.min(added, math.floor(state.level) - state.in_use))
  local woken = wake_idle(flow, state.gen > 0 and room or added)
  if woken > 0 and woken < added then state.behind = 1 end
end
if state.gen > 0 then save(state) end
return { added, (#ARGV - 5) / 2 - #wanted / 2 }
