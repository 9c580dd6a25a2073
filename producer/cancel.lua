-- cancel: take a chunk of one batch's items off the queue. Doing it again finds nothing left to do.
--
-- KEYS     as in gate.lua
-- ARGV[2]  now      us, tests only; '' = Redis' TIME
-- ARGV[3]  batch    id of the batch
-- ARGV[4]  flow     name of the flow
-- ARGV[5]  first    index of the first item of the chunk
-- ARGV[6]  count    items of the chunk, at most 1000; about 4 us each
-- ARGV[7]  what     fresh = take off only items that were never claimed, and leave the others to whoever
--                   goes on with the batch; waiting = all that do not run; all = end those that run too
-- ARGV[8]  outcome  with 'all': what is recorded of a run that goes on, as the worker encodes it
--
-- Returns {taken off, ended, counted}: items that waited; runs that were ended; those of either that the
-- batch still counts as left.
-- A waiting item leaves no outcome: the next enqueue of the batch brings it again. Unless only fresh ones
-- are taken, the batch is marked as cancelled first, so that nobody goes on enqueueing it; one that is
-- over (nothing is left, and each of its `count` items has ended) stays as it is. A run is ended
-- here: it counts as aborted, and its process hears of it and stops it. That process holds the slot until
-- then, and what it says of the run later is refused. A Redis that is full (`maxmemory`) does not refuse it.

redis.call('DEL', ROOT .. 'nothing') -- a first write that needs no memory: a full Redis lets the others through

local batch, flow, what, outcome = ARGV[3], ARGV[4], ARGV[7], ARGV[8]
local first, count = tonumber(ARGV[5]), tonumber(ARGV[6])
local limit = string.match(GATE, '{(.-)}')
local key, queue = ROOT .. 'batch:' .. batch, queue_of(flow)

local state = load('')
if state.gen > 0 then
  extend_after_stall(state, clock(state))
  save(state)
end

local known = redis.call('EXISTS', key) == 1
local facts = redis.call('HMGET', key, 'left', 'count', 'lost', 'aborted')
local items = tonumber(facts[2] or '') or 0
local over = items > 0 and (tonumber(facts[1] or '') or 0) <= 0
  and redis.call('BITCOUNT', ROOT .. 'done:' .. batch) + (tonumber(facts[3] or '') or 0) >= items
if known and not over and what ~= 'fresh' then redis.call('HSET', key, 'cancelled', 1) end
if known and not over then redis.call('HDEL', key, 'enqueued') end

-- Item of the call -> its job id, and what is known of it: a record (it was claimed once) and, where it has
-- one, its score in the queue. Most items of a long queue have neither and cost no look.
local indexes, ids, before = {}, {}, '{' .. limit .. '}:' .. batch .. ':'
for i = 1, count do
  indexes[i] = string.format('%d', first + i - 1)
  ids[i] = before .. indexes[i]
end
local records = redis.call('EXISTS', JOBS) == 1 and redis.call('HMGET', JOBS, unpack(ids)) or {}

local function score_of(i)
  return tonumber(redis.call('ZSCORE', queue, ids[i]) or '')
end

-- Record the end of a run that goes on, and tell its process.
local function abort(i, job)
  local index = indexes[i]
  redis.call('XADD', ROOT .. 'out:' .. batch, '*', 'i', index, 't', whole(job.attempt), 's', 'aborted', 'o', outcome)
  redis.call('SETBIT', ROOT .. 'done:' .. batch, index, 1)
  local process = redis.call('GET', 'arq:in-progress:' .. ids[i])
  if process then tell(process, 'abort ' .. whole(job.attempt) .. ' ' .. ids[i]) end
end

-- Take an item that was claimed once off the queue, unless it is to go on.
local claimed, beside, ended = {}, {}, 0
local function take_claimed(i, job, score)
  local runs = job and score > PARKED -- a record that cannot be read goes with its item
  if job and what == 'fresh' or (runs and what ~= 'all') then return false end
  if runs then
    abort(i, job)
    ended = ended + 1
  end
  redis.call('ZREM', LATER, ids[i])
  claimed[#claimed + 1] = ids[i]
  beside[#beside + 1] = 'arq:in-progress:' .. ids[i]
  beside[#beside + 1] = ROOT .. 'kept:' .. batch .. ':' .. indexes[i]
  return true
end

local gone, payloads, n = {}, {}, 0
for i = 1, count do
  local score = records[i] and score_of(i)
  if not records[i] or (score and take_claimed(i, read_job(records[i]), score)) then
    n = n + 1
    gone[n], payloads[n] = ids[i], 'arq:job:' .. ids[i]
  end
end
local taken = n > 0 and redis.call('ZREM', queue, unpack(gone)) - ended or 0
if taken + ended == 0 then return { 0, 0, count_of(facts[1]) or 0 } end

redis.call('DEL', unpack(payloads))
if #claimed > 0 then
  redis.call('HDEL', JOBS, unpack(claimed))
  redis.call('HDEL', SAVED, unpack(claimed))
  redis.call('DEL', unpack(beside))
end
if not known then return { taken, ended, 0 } end
if ended > 0 then redis.call('HSET', key, 'aborted', whole((count_of(facts[4]) or 0) + ended)) end
local left = math.max(0, (count_of(facts[1]) or 0) - taken - ended)
redis.call('HSET', key, 'left', whole(left))
if left == 0 then expire_batch(batch) end
return { taken, ended, left }
