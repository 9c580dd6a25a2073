-- cancel: take a chunk of one batch's items off the queue. Doing it again finds nothing left to do.
--
-- KEYS     as in gate.lua
-- ARGV[2]  now      us, tests only; '' = Redis' TIME
-- ARGV[3]  batch    id of the batch
-- ARGV[4]  flow     name of the flow
-- ARGV[5]  first    index of the first item of the chunk
-- ARGV[6]  count    items of the chunk, at most 1000
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
local facts = redis.call('HMGET', key, 'left', 'count', 'lost')
local items = tonumber(facts[2] or '') or 0
local over = items > 0 and (tonumber(facts[1] or '') or 0) <= 0
  and redis.call('BITCOUNT', ROOT .. 'done:' .. batch) + (tonumber(facts[3] or '') or 0) >= items
if known and not over and what ~= 'fresh' then redis.call('HSET', key, 'cancelled', 1) end
if known and not over then redis.call('HDEL', key, 'enqueued') end

local ids, gone, payloads = {}, {}, {}
for i = 1, count do ids[i] = '{' .. limit .. '}:' .. batch .. ':' .. whole(first + i - 1) end
local scores = redis.call('ZMSCORE', queue, unpack(ids))
local records = redis.call('HMGET', JOBS, unpack(ids))

-- Record the end of a run that goes on, and tell its process.
local function abort(i, job)
  local index = whole(first + i - 1)
  redis.call('XADD', ROOT .. 'out:' .. batch, '*', 'i', index, 't', whole(job.attempt), 's', 'aborted', 'o', outcome)
  redis.call('SETBIT', ROOT .. 'done:' .. batch, index, 1)
  local process = redis.call('GET', 'arq:in-progress:' .. ids[i])
  if process then
    redis.call('PUBLISH', 'pocketfleet:wake:' .. process, limit .. ' abort ' .. whole(job.attempt) .. ' ' .. ids[i])
  end
end

local taken, ended = 0, 0
for i, score in ipairs(scores) do
  local job = records[i] and read_job(records[i])
  local runs = job and score and tonumber(score) > PARKED
  if score and (what == 'all' or not job or (what == 'waiting' and not runs)) then
    if runs then
      abort(i, job)
      ended = ended + 1
    else
      taken = taken + 1
    end
    if job then redis.call('ZREM', LATER, ids[i]) end
    gone[#gone + 1] = ids[i]
    payloads[#payloads + 1] = 'arq:job:' .. ids[i]
    if job then
      payloads[#payloads + 1] = 'arq:in-progress:' .. ids[i]
      payloads[#payloads + 1] = ROOT .. 'kept:' .. batch .. ':' .. whole(first + i - 1)
    end
  end
end
if #gone == 0 then return { 0, 0, tonumber(redis.call('HGET', key, 'left') or '') or 0 } end

redis.call('ZREM', queue, unpack(gone))
redis.call('HDEL', JOBS, unpack(gone))
redis.call('HDEL', SAVED, unpack(gone))
redis.call('DEL', unpack(payloads))
if not known then return { taken, ended, 0 } end
if ended > 0 then redis.call('HINCRBY', key, 'aborted', ended) end
local left = redis.call('HINCRBY', key, 'left', -(taken + ended))
if left <= 0 then expire_batch(batch) end
return { taken, ended, math.max(0, left) }
