-- claim: the jobs that wait, and the claim of those with the lowest places. Part of sync.lua.

local WIDTH = 7 -- values per job of an answer

-- Made only by a call that has room for jobs, or meets a run that is due.
local function claiming()
  local jobs = {}

  -- Runs whose time has come go back to their own places, and those that wait for what is no time: at most
  -- 500 of each per call.
  function jobs.release_due()
    local ids = redis.call('ZRANGEBYSCORE', LATER, '-inf', whole(now), 'LIMIT', 0, 500)
    for _, id in ipairs(redis.call('ZRANGEBYSCORE', LATER, whole(PARKED), '+inf', 'LIMIT', 0, 500)) do
      ids[#ids + 1] = id
    end
    for _, id in ipairs(ids) do
      local job = read_job(redis.call('HGET', JOBS, id))
      if job then
        redis.call('ZADD', queue_of(job.flow), whole(job.place), id)
        returned_flows[job.flow] = true
      else
        for _, flow in ipairs(redis.call('SMEMBERS', FLOWS)) do -- its record is gone: to where the queue is now
          if redis.call('ZADD', queue_of(flow), 'XX', 'CH', whole(state.place), id) == 1 then returned_flows[flow] = true end
        end
      end
      redis.call('ZREM', LATER, id)
    end
    state.due = earliest_due()
  end

  -- The waiting jobs with the lowest places among the flows this process knows: at most `count`, and
  -- a flow of which more are left.
  local function lowest_places(count)
    local heap = {}
    for _, flow in ipairs(call.flows) do
      local rows = redis.call('ZRANGE', queue_of(flow), 0, count, 'WITHSCORES')
      for i = 1, #rows, 2 do
        local place = tonumber(rows[i + 1])
        if place >= PARKED then break end
        heap[#heap + 1] = { id = rows[i], place = place, flow = flow }
      end
    end
    if #call.flows > 1 then
      table.sort(heap, function(a, b) return a.place < b.place or (a.place == b.place and a.id < b.id) end)
    end
    local more = #heap > count and heap[count + 1].flow or nil
    for i = #heap, count + 1, -1 do heap[i] = nil end
    return heap, more
  end

  function jobs.add(claimed, id, job, payload)
    local n = #claimed
    claimed[n + 1], claimed[n + 2], claimed[n + 3] = id, whole(job.attempt), job.deaths
    claimed[n + 4], claimed[n + 5] = job.refused, job.backs
    claimed[n + 6] = job.saved == BESIDE and 'beside' or not job.new and redis.call('HGET', SAVED, id) or ''
    claimed[n + 7] = payload
  end

  -- Claim up to `count` jobs: attempt, record, parked place, in-progress mark. A job whose payload is gone
  -- ends as lost. Returns how many were met.
  function jobs.claim(count)
    local chosen
    chosen, gate.more = lowest_places(count)
    if #chosen == 0 then return 0 end
    local ids, payload_keys = {}, {}
    for i, c in ipairs(chosen) do ids[i], payload_keys[i] = c.id, 'arq:job:' .. c.id end
    local payloads = redis.call('MGET', unpack(payload_keys))
    local known = redis.call('HMGET', JOBS, unpack(ids))
    local records, running, parked, lost = {}, {}, {}, {}
    for i, c in ipairs(chosen) do
      local job = read_job(known[i]) or { deaths = 0, refused = 0, backs = 0, saved = INLINE, place = c.place, flow = c.flow, new = true }
      state.attempt, state.place = state.attempt + 1, math.max(state.place, c.place)
      job.attempt = state.attempt
      if payloads[i] then
        local n, places = #records, parked[job.flow] or {}
        records[n + 1], records[n + 2] = c.id, write_job(job)
        running[n + 1], running[n + 2] = 'arq:in-progress:' .. c.id, me
        places[#places + 1], places[#places + 2] = gate.parked, c.id
        parked[job.flow] = places
        jobs.add(gate.claimed, c.id, job, payloads[i])
      else
        lost[#lost + 1] = { id = c.id, job = job, flow = c.flow }
      end
    end
    if #lost > 0 then settling().lose(lost) end -- first: an outcome that cannot be written must leave nothing claimed
    for flow, places in pairs(parked) do
      chunks(places, 2000, function(...) redis.call('ZADD', queue_of(flow), ...) end)
    end
    chunks(records, 2000, function(...) redis.call('HSET', JOBS, ...) end)
    chunks(running, 2000, function(...) redis.call('MSET', ...) end)
    return #chosen
  end

  return jobs
end
