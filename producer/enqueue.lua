-- enqueue: add a chunk of one batch's items to the queue of their flow. Doing it again adds only what is
-- missing: an item that waits, runs or is done stays as it is.
--
-- KEYS     as in gate.lua
-- ARGV[2]  now      us, tests only; '' = Redis' TIME
-- ARGV[3]  batch    id of the batch
-- ARGV[4]  flow     name of the flow
-- ARGV[5]  spacing  places between two items of the batch: 1000 / weight
-- ARGV[6]  retry    0, or how often these items, which have ended, are retried now: one that was retried
--                   as often already stays as it is, unless a cancel has taken it off since
-- ARGV[7]  before   with a retry: the status that these items had ended with
-- ARGV[8]  index, payload, index, payload, ...  at most 1000 pairs
--
-- Returns {added, done, cancelled}: how many are new in the queue, how many were done before; 1 = the batch
-- is cancelled, so nothing was added.
-- Start-time fair queueing: a batch joins at the queue's virtual time and its items stand `spacing` apart,
-- so a short batch interleaves with a long one.

local batch, flow, spacing, retry = ARGV[3], ARGV[4], tonumber(ARGV[5]), tonumber(ARGV[6])
local FIRST_ITEM = 8
local limit = string.match(GATE, '{(.-)}')
local key, done_key, retries = ROOT .. 'batch:' .. batch, ROOT .. 'done:' .. batch, ROOT .. 'retries:' .. batch

local state = load('')
local now = clock(state)
local was_behind = state.behind
local note_time = state.gen > 0 and now - state.last > state.lease / 10 -- often enough for a stall to show
if note_time then extend_after_stall(state, now) end

local found = redis.call('HMGET', key, 'next', 'left', 'cancelled')
if found[3] then
  if note_time then save(state) end
  return { 0, 0, 1 }
end

local function id_of(index) return '{' .. limit .. '}:' .. batch .. ':' .. index end

-- Per item of the call 1 if it is done.
local function done_bits()
  if redis.call('EXISTS', done_key) == 0 then return {} end
  local asks = {}
  for i = FIRST_ITEM, #ARGV, 2 do
    asks[#asks + 1], asks[#asks + 2], asks[#asks + 3] = 'GET', 'u1', ARGV[i]
  end
  return redis.call('BITFIELD', done_key, unpack(asks))
end

-- Items that were retried as often before: index -> true. One that a cancel has taken off since is neither
-- in the queue nor done, and is brought again.
local retried = {}

-- Per item of the call 1 if there is nothing to add.
local function dealt_with()
  local dealt = done_bits()
  if retry == 0 then return dealt end
  local indexes, ids = {}, {}
  for i = FIRST_ITEM, #ARGV, 2 do
    indexes[#indexes + 1], ids[#ids + 1] = ARGV[i], id_of(ARGV[i])
  end
  local queued = redis.call('ZMSCORE', queue_of(flow), unpack(ids))
  for n, times in ipairs(redis.call('HMGET', retries, unpack(indexes))) do
    retried[indexes[n]] = (tonumber(times or '') or 0) >= retry
    dealt[n] = retried[indexes[n]] and (queued[n] or dealt[n] == 1) and 1 or 0
  end
  return dealt
end

-- The items of the call that are to be added, as index -> payload pairs in order.
local function missing()
  local wanted, dealt = {}, dealt_with()
  for i = FIRST_ITEM, #ARGV, 2 do
    if dealt[(i - FIRST_ITEM) / 2 + 1] ~= 1 then
      wanted[#wanted + 1], wanted[#wanted + 2] = ARGV[i], ARGV[i + 1]
    end
  end
  return wanted
end

-- Retried items are done no longer, and no longer counted as what they had ended with.
local function undo(wanted)
  local bits, times = {}, {}
  for i = 1, #wanted, 2 do
    if not retried[wanted[i]] then
      local n = #bits
      bits[n + 1], bits[n + 2], bits[n + 3], bits[n + 4] = 'SET', 'u1', wanted[i], '0'
      times[#times + 1], times[#times + 2] = wanted[i], retry
    end
  end
  if #times == 0 then return end
  redis.call('BITFIELD', done_key, unpack(bits))
  redis.call('HSET', retries, unpack(times))
  if (count_of(redis.call('HGET', key, ARGV[7])) or 0) > 0 then
    redis.call('HINCRBY', key, ARGV[7], -#times / 2)
  end
end

local wanted = missing()
local place = math.max(state.place, tonumber(found[1] or '') or 1)
local pairs_, places = {}, {}
for i = 1, #wanted, 2 do
  local id = id_of(wanted[i])
  pairs_[#pairs_ + 1], pairs_[#pairs_ + 2] = 'arq:job:' .. id, wanted[i + 1]
  places[#places + 1], places[#places + 2] = whole(place), id
  place = place + spacing
end
local added = 0
if #wanted > 0 then
  if retry > 0 then undo(wanted) end
  if redis.call('MSETNX', unpack(pairs_)) == 0 then
    for i = 1, #pairs_, 2 do redis.call('SETNX', pairs_[i], pairs_[i + 1]) end
  end
  added = redis.call('ZADD', queue_of(flow), 'NX', unpack(places))
end
if added > 0 then
  local left = math.max(0, count_of(found[2]) or 0)
  if left == 0 then persist_batch(batch) end
  redis.call('HSET', key, 'next', whole(place), 'left', whole(left + added))
  local room = math.max(1, math.min(added, math.floor(state.level) - state.in_use))
  local woken = wake_idle(flow, state.gen > 0 and room or added)
  if woken > 0 and woken < added then state.behind = 1 end
end
if state.gen > 0 and (note_time or state.behind ~= was_behind) then save(state) end
return { added, (#ARGV - FIRST_ITEM + 1 - #wanted) / 2, 0 }
